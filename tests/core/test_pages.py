"""Memory that is taken again step by step is faulted in once."""

import json
import platform
import subprocess
import sys

import pytest

STEPS = """
import json, resource, sys
from jaxcrit.core.pages import keep_pages
kept = sys.argv[1] == "keep" and keep_pages()
import jax, jax.numpy as jnp
step = jax.jit(lambda x: jax.nn.softmax(jnp.sin(x) @ x.T, axis=0) @ x)
x = jnp.ones((4096, 64))
faults = []
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(json.dumps([kept, faults[2:]]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the memory of glibc")
def test_a_warm_step_faults_no_page():
    """128 MiB of temporaries are 32,768 pages."""
    found = {}
    for how in ("keep", "leave"):
        done = subprocess.run([sys.executable, "-c", STEPS, how], capture_output=True, text=True, check=True)
        found[how] = json.loads(done.stdout)
    kept, faults = found["keep"]
    assert kept and 8 * max(faults) < min(found["leave"][1])
