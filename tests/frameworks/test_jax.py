"""Programs of JAX are watched in a process of their own: JAX starts threads, beside which a worker must not fork."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(find_spec("jax") is None or find_spec("optax") is None, reason="optax is not installed")


def test_suite():
    """What `suite_jax.py` says of monitors holds."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n0", "--no-header", str(Path(__file__).with_name("suite_jax.py"))],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
