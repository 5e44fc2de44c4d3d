"""Keras is watched alike on its three backends.

Each runs the suites of this folder in a process of its own: Keras reads `KERAS_BACKEND` when it is imported, and a
worker of the tests is shared by all of their files.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
SUITES = sorted(FOLDER.glob("suite_*.py"))

# What changes a model, and the code that is printed for it, are in Keras's own words: one backend, the fastest, stands
# for all of them here. `make keras` runs everything everywhere, which takes a quarter of an hour.
ONCE = ("suite_apply.py", "suite_code.py")

# What the backends say of themselves, none of it about isograd: notices for NumPy 2, of generators, of `build`.
NOTICES = ("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning", "ignore::ResourceWarning")


def environment(**more):
    """This process's, with one thread, no talk of TensorFlow's, and no accelerator."""
    quiet = {"OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}
    return {**os.environ, **quiet, **more}


def run_suites(backend, folder):
    """Every suite passes on this backend, if it is installed. `folder`: an empty one."""
    for module in ("keras", backend):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    reference = folder / "torch.json"  # what PyTorch says of the trainings that Keras is compared in
    subprocess.run([sys.executable, FOLDER / "on_torch.py", reference], env=environment(), check=True, timeout=300)
    whole = backend == "torch" or os.environ.get("KERAS_SUITES") == "all"
    suites = [str(path) for path in SUITES if whole or path.name not in ONCE]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-o", "addopts="]
    command += ["--durations=5", f"--basetemp={folder / 'pytest'}", *(f"-W{notice}" for notice in NOTICES), *suites]
    variables = environment(KERAS_BACKEND=backend, PARITY_REFERENCE=str(reference))
    if backend == "jax":  # most of the time goes into compiling
        variables["XLA_FLAGS"] = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=2400, cwd=FOLDER)
    print(done.stdout[-2000:])
    assert done.returncode == 0, f"{done.stdout[-20000:]}\n{done.stderr[-2000:]}"
