"""Loops of TensorFlow are watched in a process of their own: this one may have Keras on another backend already."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(find_spec("tensorflow") is None, reason="TensorFlow is not installed")

FOLDER = Path(__file__).parent


def run(*arguments, **environment):
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "", "TF_NUM_INTRAOP_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "KERAS_BACKEND": "tensorflow", **quiet, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_suite():
    done = run("-m", "pytest", "-q", "-n0", "--no-header", "--tb=short", str(FOLDER / "suite_tensorflow.py"))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_another_backend_is_refused_in_a_sentence():
    code = "from isograd.frameworks.tensorflow import Observer; Observer(None, None)"
    done = run("-c", code, KERAS_BACKEND="torch")
    assert "Keras computes on torch here" in done.stderr.strip().splitlines()[-1]
