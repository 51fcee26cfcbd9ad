"""Runs the steps of the net on one checkout, and keeps what they leave where it can be compared."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from net_list import RENAMED, SHORT
from net_step import Step, write_data

CHILD = Path(__file__).with_name("net_child.py")
PATIENCE = 900.0  # seconds for a step, of --full too
HELD = re.compile(r"^SigCgt:\s*([0-9a-f]+)", re.M)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the recording of one checkout is.

    Attributes:
        checkout: the checkout.
        path: folder of the recording: ``scratch`` has the files, ``records`` what the processes said and cost.
    """

    checkout: Path
    path: Path

    @property
    def scratch(self) -> Path:
        """Where the commands run."""
        return self.path / "scratch"

    @property
    def records(self) -> Path:
        """Standard output, standard error and costs, by command; and a stamp for each finished step."""
        return self.path / "records"


def entry_point(checkout: Path) -> str:
    """The function behind the ``jaxcrit`` command, such as ``jaxcrit.cli.main:main``.

    Raises:
        ValueError: neither setup.py nor pyproject.toml says.
    """
    setup, project = checkout / "setup.py", checkout / "pyproject.toml"
    if setup.exists() and (found := re.search(r"[\"']jaxcrit\s*=\s*([\w.]+:\w+)[\"']", setup.read_text("utf-8"))):
        return found[1]
    scripts = (
        tomllib.loads(project.read_text("utf-8")).get("project", {}).get("scripts", {}) if project.exists() else {}
    )
    if "jaxcrit" not in scripts:
        raise ValueError(f"{checkout}: expected a console script jaxcrit in setup.py or pyproject.toml, found none")
    return str(scripts["jaxcrit"])


def commit_of(checkout: Path) -> str:
    """The commit of a checkout without changes of its own; empty where there are some, or where git knows nothing."""

    def git(*words: str) -> str | None:
        done = subprocess.run(["git", "-C", str(checkout), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    return "" if git("status", "--porcelain") != "" else git("rev-parse", "HEAD") or ""


def machine() -> str:
    """What results may depend on besides the checkout: processor, Python, packages, and how the child counts."""
    processor = platform.processor()
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        processor = found[1] if found else processor
    versions = [f"{name} {metadata.version(name)}" for name in ("jax", "jaxlib", "numpy", "transformers")]
    parts = [processor, str(os.cpu_count()), platform.python_version(), *versions, CHILD.read_text("utf-8")]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def record(
    place: Place, steps: Sequence[Step], wanted: Sequence[str], *, jobs: int, say: Callable[[str], None]
) -> dict[str, str]:
    """Runs steps that are not recorded yet.

    Args:
        place: of the recording.
        steps: in an order in which each comes after those it needs.
        wanted: names of the steps to record; what they need is recorded too.
        jobs: steps to run at once.
        say: told of each step that has run.

    Returns:
        By the name of a step that cannot be run here, the reason.
    """
    for folder in (place.scratch, place.records):
        folder.mkdir(parents=True, exist_ok=True)
    with open(place.path / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _Recorder(place, say).all(steps, wanted, jobs)


class _Recorder:
    def __init__(self, place: Place, say: Callable[[str], None]):
        self._place, self._say = place, say
        self._entry = entry_point(place.checkout)
        self._help: dict[str, str] = {}
        self._asking = threading.Lock()
        write_data(place.scratch / "rows")
        (place.scratch / "home").mkdir(exist_ok=True)

    def all(self, steps: Sequence[Step], wanted: Sequence[str], jobs: int) -> dict[str, str]:
        """See `record`."""
        needed = set(wanted)
        for step in reversed(steps):
            if step.name in needed:
                needed |= set(step.needs)
        futures: dict[str, Future[tuple[bool, str]]] = {}
        with ThreadPoolExecutor(jobs) as pool:
            for step in steps:
                if step.name in needed:
                    futures[step.name] = pool.submit(self._step, step, [futures[name] for name in step.needs])
        return {name: future.result()[1] for name, future in futures.items() if future.result()[1]}

    def _step(self, step: Step, needs: Sequence[Future[tuple[bool, str]]]) -> tuple[bool, str]:
        """Runs a step unless it is recorded; whether it ran, and why it cannot be run."""
        renewed = any([need.result()[0] for need in needs])
        commands = {name: self._words(step, words) for name, words in step.commands(SHORT).items()}
        asked = json.dumps([commands, str(step.stop), step.processes, step.devices, step.script], sort_keys=True)
        stamp = self._place.records / f"{step.name}.step"
        if not renewed and stamp.exists() and stamp.read_text("utf-8") == asked:
            return False, ""
        if problem := self._missing(step):
            return False, problem
        stamp.unlink(missing_ok=True)
        began = time.monotonic()
        for name in commands:
            _remove(self._place.scratch / name)
            for old in self._place.records.glob(f"{name}.*"):
                old.unlink()
        with self._storage(step) as environment:
            if step.stop:
                first = next(iter(commands))
                self._run(step, {first: commands[first]}, environment, stopped=True)
            self._run(step, commands, environment)
        stamp.write_text(asked, encoding="utf-8")
        self._say(f"  {step.name}: {time.monotonic() - began:.1f} s")
        return True, ""

    def _missing(self, step: Step) -> str:
        if step.script and not (self._place.checkout / step.script).exists():
            return f"{step.script} is not there"
        if step.bucket and importlib.util.find_spec("gcsfs") is None:
            return "gcsfs is not installed"
        if step.bucket and self._stand_in() is None:
            return "tests/**/fake_storage.py is not there"
        return ""

    def _stand_in(self) -> Path | None:
        return next(iter(sorted((self._place.checkout / "tests").rglob("fake_storage.py"))), None)

    @contextlib.contextmanager
    def _storage(self, step: Step) -> Iterator[dict[str, str]]:
        """The environment that leads to a stand-in for Google's storage; then its bucket is copied to scratch."""
        path = self._stand_in() if step.bucket else None
        if path is None:
            yield {}
            return
        server = _module(path).FakeStorage("bucket")
        try:
            yield server.environment(str(self._place.scratch / "home"))
        finally:
            server.shutdown()
            server.server_close()
        for name, content in server.files("bucket/").items():
            target = self._place.scratch / name
            if content or not name.endswith("/"):
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)

    def _words(self, step: Step, words: Sequence[str]) -> list[str]:
        """Words of a command, with options as this checkout spells them."""
        return [self._spelled(step, words[0], word) if word.startswith("--") else word for word in words]

    def _spelled(self, step: Step, command: str, word: str) -> str:
        option, _, value = word.partition("=")
        others = [RENAMED.get((whose, what), ()) for whose in (command, "*") for what in (word, option)]
        candidates = [
            word,
            *(other if "=" in other or not value else f"{other}={value}" for o in others for other in o),
        ]
        if len(candidates) == 1 or step.script:
            return word
        with self._asking:
            if command not in self._help:
                self._help[command] = self._asked_help(command)
        return next((one for one in candidates if knows(self._help[command], one)), word)

    def _asked_help(self, command: str) -> str:
        self._start("help", {"help": [command, "--help"]}, {}).wait(PATIENCE)
        return (self._place.records / "help.out").read_text("utf-8")

    def _run(
        self,
        step: Step,
        commands: Mapping[str, Sequence[str]],
        environment: Mapping[str, str],
        *,
        stopped: bool = False,
    ) -> None:
        """Runs commands in one process, or in several that join; kills them where they take too long."""
        surroundings = dict(environment)
        surroundings["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={step.devices}"
        if not step.steady:
            # These run things twice, and what they cost is not compared.
            surroundings["JAX_COMPILATION_CACHE_DIR"] = str(self._place.path / "compiled")
            surroundings["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
            surroundings["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
        port, started = _free_port(), []
        for number in range(step.processes):
            machines = [
                f"--coordinator=localhost:{port}",
                f"--num_processes={step.processes}",
                f"--process_id={number}",
            ]
            mine = {name: [*words, *(machines if step.processes > 1 else ())] for name, words in commands.items()}
            suffix = (".stopped" if stopped else "") + (f".process{number}" if number else "")
            job = step.name + suffix
            started.append(self._start(job, mine, surroundings, suffix=suffix, script=step.script))
        try:
            if stopped and step.stop:
                self._interrupt(step, started)
            deadline = time.monotonic() + PATIENCE
            codes = [process.wait(max(0.0, deadline - time.monotonic())) for process in started]
        except subprocess.TimeoutExpired:
            codes = [-1] * len(started)
        finally:
            for process in started:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        if stopped:  # a process that was killed leaves no record
            first = self._place.records / f"{next(iter(commands))}.stopped.json"
            first.write_text(json.dumps({"exit": codes[0]}), encoding="utf-8")

    def _start(
        self,
        name: str,
        commands: Mapping[str, Sequence[str]],
        environment: dict[str, str],
        *,
        suffix: str = "",
        script: str = "",
    ) -> subprocess.Popen[bytes]:
        here = {key: value for key, value in os.environ.items() if not key.startswith(("JAX", "XLA_", "PYTHON"))}
        here |= {
            "PYTHONPATH": str(self._place.checkout),
            "JAX_PLATFORMS": "cpu",
            "JAXCRIT_CACHE": str(self._place.path / "cache"),
            "HF_HUB_OFFLINE": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "TZ": "UTC",
        }
        content = {
            "checkout": str(self._place.checkout),
            "entry": self._entry,
            "script": script,
            "commands": [
                {"stem": str(self._place.records / f"{command}{suffix}"), "words": list(words)}
                for command, words in commands.items()
            ],
        }
        job = self._place.records / f"{name}.job"
        job.write_text(json.dumps(content), encoding="utf-8")
        with open(self._place.records / f"{name}.start", "wb") as said:
            return subprocess.Popen(
                [sys.executable, "-P", str(CHILD), str(job)],
                cwd=self._place.scratch,
                env=here | environment,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
            )

    def _interrupt(self, step: Step, started: Sequence[subprocess.Popen[bytes]]) -> None:
        """Sends the step's signal to the last process, when it is time; of SIGKILL, to all."""
        stop, process = step.stop, started[-1]
        assert stop is not None
        file = self._place.scratch / stop.file
        deadline = time.monotonic() + PATIENCE
        while process.poll() is None and time.monotonic() < deadline:
            enough = not stop.file or (file.exists() and file.read_bytes().count(b"\n") >= stop.lines)
            if enough and (step.processes > 1 or _listens(process.pid)):
                for one in started if stop.signal.name == "SIGKILL" else [process]:
                    one.send_signal(stop.signal)
                return
            time.sleep(0.01)


def knows(page: str, option: str) -> bool:
    """Whether a help page has an option, and among its choices, where it lists them, the value."""
    name, _, value = option.partition("=")
    bare = name.removeprefix("--").removeprefix("no")
    line = re.search(rf"--(?:\[no\])?(?:{re.escape(name[2:])}|{re.escape(bare)})(?:=(\S+))?(?=\s|$)", page)
    if line is None:
        return False
    choices = (line[1] or "").split("|")
    return not value or len(choices) == 1 or value in choices


def _listens(pid: int) -> bool:
    """Whether a process has a handler of its own for SIGTERM."""
    try:
        held = HELD.search(Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return False
    return bool(held and int(held[1], 16) >> 14 & 1)


def _module(path: Path) -> ModuleType:
    """A module by its file."""
    spec = importlib.util.spec_from_file_location(f"stand_in_{abs(hash(path))}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def costs(place: Place, name: str) -> dict[str, Any]:
    """What a command cost, its exit code among it; exit ``lost`` where its process ended before it did."""
    path = place.records / f"{name}.json"
    return dict(json.loads(path.read_text("utf-8"))) if path.exists() else {"exit": "lost"}
