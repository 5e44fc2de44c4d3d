"""`isograd run`, `WatchCallback` and `isograd.watch` on programs of Keras, as a user has them: one process each."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from isograd._recorded import diagnose_run
from isograd._runs import list_runs, read_run

SICK = """\
import sys
import numpy as np, keras
keras.utils.set_random_seed(0)
x = np.random.default_rng(0).normal(size=(320, 20)).astype("float32")
y = (x[:, 0] > 0).astype("int32")
hidden = [keras.layers.Dense(24, activation="sigmoid") for _ in range(12)]
net = keras.Sequential([keras.Input((20,)), *hidden, keras.layers.Dense(2, activation="softmax")])
net.compile(keras.optimizers.SGD(0.1), "sparse_categorical_crossentropy")
history = net.fit(x, y, epochs=int(sys.argv[1]), batch_size=32, verbose=0)
print(repr(history.history["loss"]), float(np.sum(net.get_weights()[0])))
"""

CALLBACK = """\
import numpy as np, keras
import isograd
from isograd.callbacks.keras import WatchCallback
keras.utils.set_random_seed(0)
x = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
net = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, activation="relu"), keras.layers.Dense(1)])
net.compile("adam", "mse")
watcher = WatchCallback(out="runs")
net.fit(x, x[:, :1], epochs=2, batch_size=16, verbose=0, callbacks=[watcher])
assert watcher.run.step == 8
assert type(net.train_function).__name__ != "_Session"
net.fit(x, x[:, :1], epochs=1, batch_size=16, verbose=0)
with isograd.watch(net, out="runs") as run:
    net.train_on_batch(x[:16], x[:16, :1])
assert run.step == 1
assert run.histories()[0].subject == "net"
try:
    isograd.watch(net, object(), out="runs")
except ValueError as error:
    print("refused:", error)
print("healthy:", watcher.diagnose().healthy)
"""


def backend(name):
    for module in ("keras", name):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    return {**os.environ, "KERAS_BACKEND": name, "TF_CPP_MIN_LOG_LEVEL": "3", "OMP_NUM_THREADS": "1"}


def python(*arguments, cwd, env):
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, env=env, capture_output=True, text=True, timeout=300
    )


def recorded(folder):
    (run,) = list_runs(folder / "isograd-runs")
    return read_run(run.path)


@pytest.mark.parametrize("name", ["tensorflow", "torch"])
def test_an_unchanged_script(name, tmp_path):
    """Says what ails it, prints what it prints by itself, and counts every step once."""
    env = backend(name)
    (tmp_path / "train.py").write_text(SICK)
    plain = python("train.py", 2, cwd=tmp_path, env=env)
    watched = python("-m", "isograd", "run", "train.py", 2, cwd=tmp_path, env=env)

    assert watched.returncode == plain.returncode == 0, watched.stderr
    assert watched.stdout == plain.stdout
    run = recorded(tmp_path)
    assert [history.subject for history in run.histories] == ["net"]
    assert run.histories[0].num_steps == 20
    assert (run.meta["framework"], run.meta["backend"]) == ("keras", name)
    assert next(cause["cause"] for cause in diagnose_run(run, {}).to_dict()["causes"]) == "saturating-activations"
    assert "saturating-activations" in watched.stderr
    shown = python("-m", "isograd", "treat", "--json", cwd=tmp_path, env=env)
    codes = [treatment["code"] for treatment in json.loads(shown.stdout)["treatments"]]
    assert any("keras" in code for code in codes)
    assert not any("torch." in code for code in codes)


def test_so_many_steps_and_a_change(tmp_path):
    """`--steps` ends the script behind that very step, and `--apply` is seen in what is recorded."""
    env = backend("torch")
    (tmp_path / "train.py").write_text(SICK)
    done = python(
        "-m", "isograd", "run", "--steps", 7, "--apply", "lower-learning-rate:factor=0.5", "train.py", 50,
        cwd=tmp_path, env=env,
    )  # fmt: skip

    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    run = recorded(tmp_path)
    assert run.histories[0].num_steps == 7
    assert run.histories[0]["learning_rate"].values[0] == pytest.approx(0.05)


def test_a_guard_that_may_do_too_much(tmp_path):
    """What a guard cannot do in Keras is said in a sentence, and the script is watched all the same."""
    env = backend("torch")
    (tmp_path / "train.py").write_text(SICK)
    done = python("-m", "isograd", "run", "--guard", "skip,clip", "--steps", 3, "train.py", 1, cwd=tmp_path, env=env)

    assert done.returncode == 0, done.stderr
    assert "a Keras program can be guarded with skip alone, not with clip; it is not guarded." in done.stderr
    assert recorded(tmp_path).histories[0].num_steps == 3


def test_the_callback(tmp_path):
    """`WatchCallback` watches one `fit` and leaves the model as it was; `watch(model)` watches what is in it."""
    env = backend("torch")
    (tmp_path / "train.py").write_text(CALLBACK)
    done = python("train.py", cwd=tmp_path, env=env)

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith("isograd: ")
    assert "refused: watch() takes objects of one framework at a time" in done.stdout
    assert done.stdout.splitlines()[-1] == "healthy: True"
    assert len(list_runs(tmp_path / "runs")) == 2


def test_without_keras(tmp_path):
    """Where Keras, TensorFlow and JAX cannot be imported, a program of PyTorch is watched as ever."""
    (tmp_path / "train.py").write_text(
        "import torch\n"
        "model = torch.nn.Linear(3, 1)\n"
        "optimizer = torch.optim.SGD(model.parameters(), 0.1)\n"
        "for _ in range(5):\n"
        "    optimizer.zero_grad()\n"
        "    model(torch.ones(4, 3)).square().mean().backward()\n"
        "    optimizer.step()\n"
    )
    for module in ("keras", "tensorflow", "jax", "optax"):
        (tmp_path / f"{module}.py").write_text("raise ImportError('not here')\n")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = python("-m", "isograd", "run", "train.py", cwd=tmp_path, env=env)

    assert done.returncode == 0, done.stderr
    assert recorded(tmp_path).histories[0].num_steps == 5
