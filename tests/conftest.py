"""What every test needs before jax is imported: eight CPU devices, and a compile cache where one is asked for."""

import gc
import os
import sys
from pathlib import Path

import hypothesis
import pytest

SHARED = Path(__file__).parents[2] / "shared"

if "--xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Two BLAS threads that wait for busy cores spin: float64 oracles of 0.1 s took 25 s on a loaded machine.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
if cache := os.environ.get("JAXCRIT_TEST_CACHE"):
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", cache)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
if os.environ.get("JAXCRIT_REQUIRE_PARITY") == "1":
    import torch  # noqa: F401  (parity tests skip without it; here its absence is an error)

# A busy machine takes its time; what a test may cost is asserted in operations.
# The same examples each time, so that a change is judged by itself; .ci/full looks for others.
hypothesis.settings.register_profile("untimed", deadline=None, derandomize="JAXCRIT_EXPLORE" not in os.environ)
hypothesis.settings.load_profile("untimed")


@pytest.fixture(scope="session")
def storage_server():
    """One for all tests, for clients remember where it is."""
    from support.fake_storage import FakeStorage

    return FakeStorage()


@pytest.fixture
def storage(storage_server, tmp_path, monkeypatch):
    """A stand-in for Google's.

    ``gs://bucket`` is empty; in ``gs://sealed`` nothing may be written; ``gs://hidden`` says nothing of itself.
    """
    pytest.importorskip("gcsfs", reason="needs gcsfs: pip install -e '.[gcs]'")
    for name, value in storage_server.environment(str(tmp_path / "home")).items():
        monkeypatch.setenv(name, value)
    storage_server.buckets = {"bucket": {}, "sealed": {}, "hidden": {}}
    storage_server.refused = {"sealed": {"POST", "PUT", "DELETE"}, "hidden": {"BUCKET"}}
    storage_server.puts.clear()
    return storage_server


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """Lets go of compiled programs before there are too many: each maps memory, and Linux allows 65,530 maps."""
    yield
    maps = Path("/proc/self/maps")
    if "jax" in sys.modules and maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        sys.modules["jax"].clear_caches()
        gc.collect()
