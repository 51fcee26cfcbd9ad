"""Where jax keeps compiled programs between processes: a second run of a command compiles nothing again."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import sys
import warnings
from pathlib import Path

from jaxcrit.core.files import cache_directory, sweep

# Bytes of the user's cache directory that programs may take; what was used longest ago goes first.
LARGEST = 2**30
_ALL = {
    # jax keeps nothing that compiles within a second unless told to; on CPUs that is nearly everything.
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


def keep_programs(directory: str) -> None:
    """Has jax keep the programs it compiles; what the environment says of this goes first.

    Args:
        directory: where; ``none`` for nowhere; empty for the user's cache directory, unless jax is already in use here
            (a Python program that calls a command has its own mind).
    """
    if directory == "none":
        _set({"jax_enable_compilation_cache": False}, named=True)
        return
    if not directory and ("jax" in sys.modules or "JAX_COMPILATION_CACHE_DIR" in os.environ):
        return
    chosen = directory or _own()
    if chosen:
        # An entry that another process is writing, or that a kill cut short, is compiled again: no reason to speak.
        warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache entry")
        _set({"jax_compilation_cache_dir": chosen, **_ALL}, named=bool(directory))


def _set(values: dict[str, object], named: bool) -> None:
    """Settings of jax, by the environment as long as nothing has imported it: many commands never do."""
    if "jax" in sys.modules:
        import jax

        for name, value in values.items():
            jax.config.update(name, value)
        return
    for name, value in values.items():
        if named or name.upper() not in os.environ:
            os.environ[name.upper()] = str(value)


def _own() -> str:
    """The user's directory for programs of this kind of processor, made and swept; empty where there can be none.

    Programs are code: a directory that others may write to, or that belongs to somebody else, is not used.
    """
    try:
        root = cache_directory() / "programs"
        place = root / _processor()
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        for part in (root, place):
            part.chmod(0o700)
        sweep(root.glob("*/*"), LARGEST)
        return str(place)
    except (OSError, RuntimeError):  # no home, a full disk, a directory of another user's
        return ""


def _processor() -> str:
    """Name for processors that run the same machine code: a home may be shared by several machines."""
    features = platform.processor() + platform.node()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        told = [line for line in lines if line.partition(":")[0].strip() in ("model name", "flags", "Features")]
        features = "\n".join(dict.fromkeys(told)) or features
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:12]}"
