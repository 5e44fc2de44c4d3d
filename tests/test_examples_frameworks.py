"""The examples for Keras, TensorFlow and JAX run and learn; isograd says the same of one network in four frameworks."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from isograd._recorded import diagnose_run
from isograd._runs import list_runs, read_run

EXAMPLES = Path(__file__).parents[1] / "examples"
KERAS, OPTAX = ("keras", "tensorflow"), ("jax", "optax")
FRAMEWORKS = {"torch": (), "keras": KERAS, "tensorflow": KERAS, "optax": OPTAX}


def run(*arguments, cwd, needs):
    """(what an example prints under `isograd run`, what was recorded of it)."""
    for module in needs:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    env = {**os.environ, "KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "isograd", "run", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    runs = list_runs(cwd / "isograd-runs")
    return done.stdout, read_run(runs[0].path) if runs else None


def causes(run):
    return [cause["cause"] for cause in diagnose_run(run, {}).to_dict()["causes"] if cause["level"] != "info"]


def test_a_linear_model_in_tensorflow(tmp_path):
    """It finds the line, step by step, and every step that it tells of is recorded."""
    printed, recorded = run(EXAMPLES / "linear_regression_tensorflow.py", "--steps", 60, cwd=tmp_path, needs=KERAS)

    slope, intercept = map(float, re.search(r"y = (\S+) x \+ (\S+)", printed).groups())
    assert (slope, intercept) == (pytest.approx(3, abs=0.05), pytest.approx(1, abs=0.05))
    (history,) = recorded.histories
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", printed)]
    np.testing.assert_allclose(history["loss"].values[[0, 20, 40, 59]], losses, atol=1e-4)
    assert causes(recorded) == []


def test_the_perceptron_in_keras(tmp_path):
    """It learns the digits, and isograd has nothing to say against it."""
    printed, recorded = run(EXAMPLES / "mlp_digits_keras.py", "--epochs", 5, cwd=tmp_path, needs=KERAS)

    assert float(re.findall(r"accuracy (\S+)", printed)[-1]) > 0.95
    assert recorded.histories[0].num_steps == 5 * 29
    assert causes(recorded) == []


def test_the_perceptron_in_jax(tmp_path):
    """Likewise."""
    printed, recorded = run(EXAMPLES / "mlp_digits_optax.py", "--steps", 150, cwd=tmp_path, needs=OPTAX)

    assert float(re.findall(r"loss (\S+)", printed)[-1]) < 0.5
    assert recorded.histories[0].num_steps == 150
    assert causes(recorded) == []


def test_clipping_side_by_side(tmp_path):
    """TensorFlow and PyTorch print equal numbers, whatever clips, and each way to clip takes a way of its own."""
    printed, _ = run(EXAMPLES / "gradient_clipping.py", cwd=tmp_path, needs=KERAS)

    rows = re.findall(r"^(\S+) +step +(\d+) +TensorFlow +(\S+) +PyTorch +(\S+)$", printed, re.MULTILINE)
    assert len(rows) == 20
    for _, _, here, there in rows:
        assert float(here) == pytest.approx(float(there), rel=1e-3)
    first, last = ({clip: float(loss) for clip, step, loss, _ in rows if step == at} for at in ("0", "40"))
    assert len(set(first.values())) == 1
    assert len(set(last.values())) == 4
    assert max(last.values()) < 0.6 * first["none"]


def test_one_sick_network_in_four_frameworks(tmp_path):
    """The same losses, the same gradients, and the same cause; optax shows no layers, and so names the symptom."""
    found = {}
    for framework, needs in FRAMEWORKS.items():
        folder = tmp_path / framework
        folder.mkdir()
        _, found[framework] = run(EXAMPLES / "sick_network.py", framework, "--steps", 120, cwd=folder, needs=needs)

    losses = {name: recorded.histories[0]["loss"].values for name, recorded in found.items()}
    norms = {name: np.sort(recorded.histories[0]["grad_norm"].values[0]) for name, recorded in found.items()}
    for name in FRAMEWORKS:
        np.testing.assert_allclose(losses[name], losses["torch"], rtol=1e-4, err_msg=name)
        np.testing.assert_allclose(norms[name], norms["torch"], rtol=1e-3, err_msg=name)
    firsts = {name: causes(recorded)[0] for name, recorded in found.items() if name != "optax"}
    assert set(firsts.values()) == {"saturating-activations"}
    symptoms = diagnose_run(found["optax"], {}).to_dict()
    assert "vanishing-gradients" in str(symptoms)
