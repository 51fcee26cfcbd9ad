#!/usr/bin/env bash
# Makes a TPU VM or pod slice, installs jaxcrit on all its workers, runs a command on all of them, and deletes it.
set -euo pipefail

usage() {
  cat <<'EOF'
usage: tpu_scripts/pod.sh [flags] VERB [arguments]

  create              make the TPU VM or slice and wait until it is ready
  install             copy this checkout to every worker and install it there
  run ARGUMENTS...    jaxcrit ARGUMENTS on every worker; output in --logs, each line with its worker in front
  survive ARGUMENTS.. create, install and run; after a preemption again, until the command has ended
  fetch GS_DIR DIR    bring a run directory from its bucket
  status              state of the TPU
  delete              delete it

Every flag has an environment variable, named in brackets:
  --name=NAME         of the TPU [TPU_NAME]
  --zone=ZONE         such as us-west4-a [TPU_ZONE]
  --type=TYPE         accelerator, such as v5litepod-16 [TPU_TYPE]
  --version=VERSION   runtime image (default v2-alpha-tpuv5-lite) [TPU_VERSION]
  --project=PROJECT   of the cloud account (default: gcloud's own) [TPU_PROJECT]
  --spot              cheaper, may be preempted [TPU_SPOT=1]
  --queued            ask for it as a queued resource [TPU_QUEUED=1]
  --service_account=EMAIL  whose permissions the workers have (default: the project's) [TPU_SERVICE_ACCOUNT]
  --logs=DIR          of output (default pod-logs) [TPU_LOGS]
  --wait=SECONDS      between looks at the state (default 30) [TPU_WAIT]
  --tries=N           of survive (default 20) [TPU_TRIES]
  --dry_run           print every command instead of running it [TPU_DRY_RUN=1]

survive wants --out=gs://BUCKET/DIR: the run goes on from there, for what is on the workers is gone with them. fetch
brings it from there at any time, also while it runs. docs/pods.md says what the service account must be allowed.
EOF
}

fail() {
  echo "pod.sh: error: $*" >&2
  exit 2
}

name=${TPU_NAME:-} zone=${TPU_ZONE:-} type=${TPU_TYPE:-} project=${TPU_PROJECT:-} account=${TPU_SERVICE_ACCOUNT:-}
version=${TPU_VERSION:-v2-alpha-tpuv5-lite} logs=${TPU_LOGS:-pod-logs}
spot=${TPU_SPOT:-} queued=${TPU_QUEUED:-} wait=${TPU_WAIT:-30} tries=${TPU_TRIES:-20} dry_run=${TPU_DRY_RUN:-}

while (($#)); do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --service_account=*) account=${1#*=} ;;
    --logs=*) logs=${1#*=} ;;
    --wait=*) wait=${1#*=} ;;
    --tries=*) tries=${1#*=} ;;
    --spot) spot=1 ;;
    --queued) queued=1 ;;
    --dry_run) dry_run=1 ;;
    --help | -h) usage && exit 0 ;;
    -*) fail "unknown flag $1; flags stand in front of the verb, see pod.sh --help" ;;
    *) break ;;
  esac
  shift
done
(($#)) || { usage >&2 && exit 2; }
verb=$1
shift

# Runs a command, or prints it as one could paste it.
do_or_show() {
  if [[ ! $dry_run ]]; then
    "$@"
    return
  fi
  local word words=()
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]] || word=${word@Q}
    words+=("$word")
  done
  echo "${words[*]}"
}

where=(--zone="$zone")
[[ $project ]] && where+=(--project="$project")

tpu() { do_or_show gcloud compute tpus "$@" "${where[@]}"; }

# State of the TPU, or ABSENT. Looks only, so --dry_run runs it as well as it can.
state() {
  if [[ $dry_run ]]; then
    echo READY
  else
    local found
    found=$(gcloud compute tpus tpu-vm describe "$name" "${where[@]}" --format='value(state)' 2>/dev/null) || found=ABSENT
    echo "$found"
  fi
}

create() {
  [[ $type ]] || fail "create: expected --type, such as v5litepod-16"
  local extra=()
  [[ $spot ]] && extra+=(--spot)
  [[ $account ]] && extra+=(--service-account="$account")
  case $(state) in
    READY) [[ $dry_run ]] || { echo "pod.sh: $name is ready" >&2 && return; } ;;
    # The machines of a preempted queued resource are gone; it itself is still there, and has the name.
    ABSENT) [[ ! $queued || $dry_run || ! $(queue_state) =~ FAILED|SUSPEND ]] || delete ;;
    *) delete ;; # preempted or broken: a new one takes the name
  esac
  if [[ $queued ]]; then
    tpu queued-resources create "$name" --node-id="$name" --accelerator-type="$type" --runtime-version="$version" "${extra[@]}"
  else
    tpu tpu-vm create "$name" --accelerator-type="$type" --version="$version" "${extra[@]}"
  fi
  local now
  until now=$(state) && [[ $now == READY ]]; do
    if [[ $now =~ PREEMPTED|TERMINATED|STOPPED ]]; then
      echo "pod.sh: $name was $now before it was ready" >&2
      return 1
    fi
    if [[ $queued && $(queue_state) =~ FAILED|SUSPENDED ]]; then
      fail "create: the queued resource $name is $(queue_state); pod.sh delete, then ask again"
    fi
    sleep "$wait"
  done
}

queue_state() {
  gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format='value(state.state)' 2>/dev/null || true
}

# A command line on every worker at once: jax needs all of them, or it waits for the others.
everywhere() { tpu tpu-vm ssh "$name" --worker=all --command="$1"; }

install() {
  local source archive
  source=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  archive=$(mktemp -d)/jaxcrit.tar.gz
  do_or_show tar -czf "$archive" -C "$source" --exclude=.git --exclude=.venv --exclude=__pycache__ . &&
    tpu tpu-vm scp --worker=all "$archive" "$name:jaxcrit.tar.gz" &&
    everywhere 'mkdir -p jaxcrit && tar -xzf jaxcrit.tar.gz -C jaxcrit && python3 -m venv jaxcrit-venv && jaxcrit-venv/bin/pip install -q -e "jaxcrit[tpu,gcs]"' &&
    do_or_show rm -r "$(dirname "$archive")"
}

run() {
  (($#)) || fail "run: expected the arguments of jaxcrit, such as: run analyze --model=DIR --out=gs://BUCKET/DIR"
  local line log
  line=$(printf '%q ' jaxcrit-venv/bin/jaxcrit "$@" --distributed=on)
  line="set -o pipefail; $line 2>&1 | sed -u \"s/^/[\$(hostname)] /\""
  log=$logs/$name-$(date -u +%Y%m%dT%H%M%SZ).log
  do_or_show mkdir -p "$logs"
  if [[ $dry_run ]]; then
    everywhere "bash -c $(printf %q "$line")"
  else
    everywhere "bash -c $(printf %q "$line")" 2>&1 | tee "$log"
  fi
}

survive() {
  local try code
  [[ " $*" == *" --out=gs://"* || " $*" == *" --out gs://"* ]] ||
    fail "survive: expected --out=gs://BUCKET/DIR; what is on the workers is gone when they are preempted"
  for ((try = 1; try <= tries; try++)); do
    code=0
    if create && install; then run "$@" || code=$?; else code=1; fi
    ((code == 0)) && return
    # 2 is a mistake in the command, 3 a plan that does not fit: trying again changes nothing.
    ((code == 2 || code == 3)) && return "$code"
    if [[ $(state) == READY ]] && ((code != 75)); then
      echo "pod.sh: jaxcrit ended with $code on a TPU that is still there; not trying again" >&2
      return "$code"
    fi
    echo "pod.sh: $name was preempted; try $((try + 1)) of $tries" >&2
  done
  fail "survive: preempted $tries times"
}

fetch() {
  (($# == 2)) || fail "fetch: expected gs://BUCKET/DIR and a directory here"
  do_or_show mkdir -p "$2"
  do_or_show gcloud storage rsync --recursive "$1" "$2"
}

delete() {
  if [[ $queued ]]; then
    tpu queued-resources delete "$name" --force --quiet
  else
    tpu tpu-vm delete "$name" --quiet
  fi
}

case $verb in
  fetch) ;;
  create | install | run | survive | status | delete)
    [[ $name && $zone ]] || fail "$verb: expected --name and --zone (or TPU_NAME and TPU_ZONE)"
    ;;
  *) fail "unknown verb $verb; expected create, install, run, survive, fetch, status or delete" ;;
esac
[[ $dry_run ]] || command -v gcloud >/dev/null || fail "needs gcloud, the command line of the cloud; or --dry_run"
case $verb in
  status) state ;;
  *) "$verb" "$@" ;;
esac
