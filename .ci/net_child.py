"""Runs commands of one checkout one after the other in one process, and writes down what each of them cost.

`net_record` starts it as ``python -P net_child.py JOB.json``. The job says where the checkout is, which function is its
console script, and the commands. Beside each command's standard output and error this leaves a JSON file with its exit
code, what jax compiled and ran for it, and the peak of resident memory. Nothing here imports jax or the checkout before
the command itself does, so that a command that needs neither stays as quick as it is.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import json
import os
import resource
import runpy
import sys
import traceback
import weakref
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

COMPILED = "/jax/core/compile/backend_compile_duration"


class Counts:
    """What jax compiled and ran since `start`.

    Attributes:
        problem: why runs are not counted, where jax has changed inside; empty otherwise.
    """

    def __init__(self) -> None:
        self.problem = ""
        self._costs: weakref.WeakKeyDictionary[Any, tuple[float, int]] = weakref.WeakKeyDictionary()
        self.start()

    def start(self) -> None:
        """Begins anew at 0."""
        self._compiles, self._runs, self._flops, self._temporaries = 0, 0, 0.0, 0
        self._programs: dict[str, list[int]] = {}

    def found(self) -> dict[str, Any]:
        """The counts: ``programs`` maps the name of a compiled function to its compilations and its runs."""
        found: dict[str, Any] = {"jax": "jax" in sys.modules, "compiles": self._compiles}
        if self.problem:
            return found | {"problem": self.problem}
        return found | {
            "runs": self._runs,
            "flops": round(self._flops),
            "temporaries": self._temporaries,
            "programs": dict(sorted(self._programs.items())),
        }

    def install(self) -> None:
        """Listens to jax; called as soon as it is imported."""
        from jax import monitoring

        monitoring.register_event_duration_secs_listener(self._event)
        try:
            from jax._src import pjit
            from jax._src.interpreters import pxla

            execute, _ = pxla.ExecuteReplicated.__call__, pjit._get_fastpath_data
            pxla.MeshExecutable.create_cpp_call  # noqa: B018  (an AttributeError here, not in the middle)
        except (ImportError, AttributeError) as error:
            self.problem = f"jax has changed inside: {error}"
            return

        def counted(program: Any, *arguments: Any) -> Any:
            self._ran(program)
            return execute(program, *arguments)

        # Programs that jax calls from C++ would pass unseen.
        pxla.ExecuteReplicated.__call__ = counted  # type: ignore[method-assign]
        pjit._get_fastpath_data = lambda *_, **__: None
        pxla.MeshExecutable.create_cpp_call = lambda *_, **__: None  # type: ignore[method-assign]

    def _event(self, event: str, duration_secs: float, **about: Any) -> None:
        if event == COMPILED:
            self._compiles += 1
            self._programs.setdefault(str(about.get("fun_name", "")), [0, 0])[0] += 1

    def _ran(self, program: Any) -> None:
        if program not in self._costs:
            self._costs[program] = _cost(program.xla_executable)
        flops, temporaries = self._costs[program]
        self._runs += 1
        self._flops += flops
        self._temporaries = max(self._temporaries, temporaries)
        name = str(program.name).removeprefix("jit_")
        self._programs.setdefault(name, [0, 0])[1] += 1


def _cost(executable: Any) -> tuple[float, int]:
    """Operations and bytes of temporaries of one compiled program; 0 where the backend does not say."""
    try:
        costs = executable.cost_analysis()
        costs = costs[0] if isinstance(costs, list) else costs
        return float(costs.get("flops", 0.0)), int(executable.get_compiled_memory_stats().temp_size_in_bytes)
    except Exception:
        return 0.0, 0


class AfterImport(importlib.abc.MetaPathFinder):
    """Calls a function once, right after a module has been imported by whoever needs it."""

    def __init__(self, name: str, then: Callable[[], None]):
        self._name, self._then = name, then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's own spec, whose loader then calls the function."""
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_then_tell(module: ModuleType) -> None:
            execute(module)
            self._then()

        spec.loader.exec_module = execute_then_tell  # type: ignore[method-assign]
        return spec


def peak_memory(*, reset: bool = False) -> int:
    """Peak of resident memory in bytes; since the last reset where Linux lets it be reset, else of the process."""
    if reset:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return 0
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(job: dict[str, Any], words: list[str]) -> int:
    """One command; returns its exit code."""
    try:
        if job["script"]:
            path = Path(job["checkout"]) / job["script"]
            sys.argv = [str(path), *words]
            sys.path.insert(0, str(path.parent))
            runpy.run_path(str(path), run_name="__main__")
            return 0
        sys.argv = ["jaxcrit", *words]
        module, _, function = job["entry"].partition(":")
        main = getattr(importlib.import_module(module), function)
        here = str(sys.modules[module].__file__)
        if not here.startswith(job["checkout"] + os.sep):
            raise RuntimeError(f"{module} is {here}, which is not of the checkout {job['checkout']}")
        return int(main() or 0)
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
            return 1
        return int(stop.code or 0)
    except Exception:
        traceback.print_exc()
        return 1


def main() -> int:
    """Runs the job; returns the exit code of its last command."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    counts = Counts()
    sys.meta_path.insert(0, AfterImport("jax", counts.install))
    code = 0
    for command in job["commands"]:
        stem = command["stem"]
        for number, kind in ((1, "out"), (2, "err")):
            with open(f"{stem}.{kind}", "wb") as file:
                os.dup2(file.fileno(), number)
        counts.start()
        peak_memory(reset=True)
        code = run(job, command["words"])
        sys.stdout.flush()
        sys.stderr.flush()
        content = {"exit": code, "peak": peak_memory(), **counts.found()}
        Path(f"{stem}.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main())
