/* Counts what a process does to the files below one directory, and lets one such operation fail.
 *
 * Loaded before the C library (LD_PRELOAD). From faults_arm on, operations are numbered from 1; number `at` fails with
 * `code`. After a crash (`crash` != 0) a write leaves its first half, and every later operation fails too, as if the
 * process had been killed there: what is on the disk then is what a kill would leave.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static pthread_mutex_t one = PTHREAD_MUTEX_INITIALIZER;
static char below[PATH_MAX], hit[PATH_MAX + 32];
static long done, at;
static int armed, code, crash, dead;

void faults_arm(const char *directory, long number, int error, int as_crash) {
  pthread_mutex_lock(&one);
  snprintf(below, sizeof below, "%s", directory);
  done = 0, at = number, code = error, crash = as_crash, dead = 0, hit[0] = 0, armed = 1;
  pthread_mutex_unlock(&one);
}
long faults_disarm(void) { armed = 0; return done; }
const char *faults_hit(void) { return hit; }

static int fails(const char *operation, const char *path, int *torn) {
  int error = 0;
  if (!armed || !path || strncmp(path, below, strlen(below))) return 0;
  pthread_mutex_lock(&one);
  if (dead) error = code;
  else if (++done == at) {
    snprintf(hit, sizeof hit, "%s %s", operation, path);
    error = code, dead = crash;
    if (torn) *torn = crash;
  }
  pthread_mutex_unlock(&one);
  return error;
}
static const char *path_of(int file, char *path) {
  char link[40];
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  ssize_t length = readlink(link, path, PATH_MAX - 1);
  path[length < 0 ? 0 : length] = 0;
  return path;
}
static const char *at_path(int directory, const char *path, char *full) {
  char base[PATH_MAX];
  if (path[0] == '/') return path;
  if (directory == AT_FDCWD) { if (!getcwd(base, sizeof base)) return path; }
  else path_of(directory, base);
  if (strlen(base) + strlen(path) + 2 > PATH_MAX) return path;
  stpcpy(stpcpy(stpcpy(full, base), "/"), path);
  return full;
}
#define NEXT(name) static __typeof__(&name) next; if (!next) next = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define REFUSE(operation, path) do { int e = fails(operation, path, 0); if (e) { errno = e; return -1; } } while (0)

#define OPEN(name, declared, passed, directory) \
  int name declared { \
    NEXT(name); \
    char full[PATH_MAX]; mode_t mode = 0; va_list rest; \
    if (flags & (O_CREAT | O_TMPFILE)) { va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest); } \
    if (flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC)) REFUSE("open", at_path(directory, path, full)); \
    return next passed; \
  }
OPEN(open, (const char *path, int flags, ...), (path, flags, mode), AT_FDCWD)
OPEN(open64, (const char *path, int flags, ...), (path, flags, mode), AT_FDCWD)
OPEN(openat, (int dir, const char *path, int flags, ...), (dir, path, flags, mode), dir)
OPEN(openat64, (int dir, const char *path, int flags, ...), (dir, path, flags, mode), dir)

#define WRITE(name, declared, whole, half) \
  ssize_t name declared { \
    NEXT(name); \
    char path[PATH_MAX]; int torn = 0; \
    int error = armed ? fails("write", path_of(file, path), &torn) : 0; \
    if (!error) return next whole; \
    if (torn && next half < 0) {} \
    errno = error; return -1; \
  }
WRITE(write, (int file, const void *from, size_t size), (file, from, size), (file, from, size / 2))
WRITE(pwrite, (int file, const void *from, size_t size, off_t place), (file, from, size, place),
      (file, from, size / 2, place))
WRITE(pwrite64, (int file, const void *from, size_t size, off64_t place), (file, from, size, place),
      (file, from, size / 2, place))

int fsync(int file) { NEXT(fsync); char path[PATH_MAX]; if (armed) REFUSE("fsync", path_of(file, path)); return next(file); }
int fdatasync(int file) { NEXT(fdatasync); char path[PATH_MAX]; if (armed) REFUSE("fsync", path_of(file, path)); return next(file); }
int ftruncate(int file, off_t size) { NEXT(ftruncate); char path[PATH_MAX]; if (armed) REFUSE("truncate", path_of(file, path)); return next(file, size); }

#define NAMED(name, declared, passed, directory, path) \
  int name declared { NEXT(name); char full[PATH_MAX]; if (armed) REFUSE(#name, at_path(directory, path, full)); return next passed; }
NAMED(rename, (const char *from, const char *to), (from, to), AT_FDCWD, to)
NAMED(renameat, (int a, const char *from, int b, const char *to), (a, from, b, to), b, to)
NAMED(mkdir, (const char *path, mode_t mode), (path, mode), AT_FDCWD, path)
NAMED(unlink, (const char *path), (path), AT_FDCWD, path)
NAMED(unlinkat, (int dir, const char *path, int flags), (dir, path, flags), dir, path)
NAMED(rmdir, (const char *path), (path), AT_FDCWD, path)
NAMED(chmod, (const char *path, mode_t mode), (path, mode), AT_FDCWD, path)
