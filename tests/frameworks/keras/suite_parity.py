"""The same training on Keras and on PyTorch: the same readings, the same diagnosis."""

import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers
from scenarios import SCENARIOS, told
from watching import every_step, watched

from isograd._diagnose import diagnose
from isograd._statistics import STATISTICS

BACKEND = keras.backend.backend()
"""The other ways into isograd (optax, plain TensorFlow) can be held against the same file."""

APART = {"step_seconds", "watch_seconds", "row_sum_min", "row_sum_max"}
"""What need not agree: clocks, and the sums of rows, which PyTorch reads at layers and Keras at predictions."""


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """What PyTorch says of each scenario. `PARITY_REFERENCE`: the file, where it has been written already."""
    path = Path(os.environ.get("PARITY_REFERENCE", tmp_path_factory.mktemp("parity") / "torch.json"))
    if not path.exists():
        subprocess.run([sys.executable, Path(__file__).with_name("on_torch.py"), path], check=True)
    return json.loads(path.read_text())


def model_of(scenario):
    model = keras.Sequential([keras.Input((6, 6, 2) if scenario.is_image else (10,))])
    for number, (kind, units, activation) in enumerate(scenario.layers):
        if kind == "conv":
            model.add(layers.Conv2D(units, 3, padding="same", activation=activation or None, name=f"layer{number}"))
            continue
        if scenario.is_image and number == len(scenario.layers) - 1:
            model.add(layers.GlobalAveragePooling2D(keepdims=True, name="pool"))
            model.add(layers.Flatten(name="flatten"))
        model.add(layers.Dense(units, activation=activation or None, name=f"layer{number}"))
    if scenario.softmax:
        model.add(layers.Softmax(name="softmax"))
    weights = [value for pair in scenario.weights() for value in pair]
    model.set_weights([np.transpose(w, (*range(2, w.ndim), 1, 0)) if w.ndim > 1 else w for w in weights])
    model.compile(
        keras.optimizers.SGD(scenario.rate, momentum=scenario.momentum),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model


@pytest.fixture(scope="module", params=SCENARIOS)
def both(request, reference, tmp_path_factory):
    """(the scenario, what PyTorch says, what Keras says), each as `told` writes it."""
    scenario = SCENARIOS[request.param]
    if scenario.softmax and BACKEND == "tensorflow":
        pytest.skip("on TensorFlow Keras takes the logits in front of a softmax by itself")
    keras.utils.clear_session(free_memory=False)
    model = model_of(scenario)
    with watched(tmp_path_factory.mktemp("run"), every_step) as watch:
        for x, y in zip(*scenario.batches(), strict=True):
            model.train_on_batch(np.moveaxis(x, 1, -1) if scenario.is_image else x, y)
    run = watch.run
    return scenario, reference[request.param], told(watch.history, diagnose(run.histories, run=run.id))


def modules(facts):
    """Places of the modules among the layers."""
    return [place for place, (_, _, role, _) in enumerate(facts["layers"]) if role in ("module", "operation")]


def boundaries(facts):
    """Places of inputs and targets; what enters the loss of a classifier is its logarithms on PyTorch."""
    roles = [role for _, _, role, _ in facts["layers"]]
    return [roles.index("input"), roles.index("target")]


def test_the_layers_are_the_same(both):
    """Names, kinds, units and fans of layers, and the order of parameters, are those of PyTorch."""
    _, expected, found = both
    for facts in (expected, found):
        facts["modules"] = [[*facts["layers"][place][:2], facts["layers"][place][3]] for place in modules(facts)]
        facts["module_fans"] = [facts["fans"][place] for place in modules(facts)]
    assert found["modules"] == expected["modules"]
    assert found["module_fans"] == expected["module_fans"]
    names = [name.replace("kernel", "weight") for name, _ in found["parameters"]]
    assert names == [name for name, _ in expected["parameters"]]


def test_every_reading_is_the_same(both):
    """What both measure agrees within 1e-4, as long as rounding has not grown."""
    scenario, expected, found = both
    shared = sorted(expected["series"].keys() & found["series"].keys() - APART)
    assert len(shared) >= 30
    if scenario.is_image:
        shared.remove("row_similarity")  # of other rows where channels are elsewhere
    wrong = []
    for name in shared:
        values = []
        for facts in (expected, found):
            steps, rows = facts["series"][name]
            array = np.array(rows, dtype=np.float64).reshape(len(steps), -1)[: scenario.exact]
            if STATISTICS[name].axis == "layer":
                array = array[:, [*modules(facts), *(boundaries(facts) if name != "input_nonfinite" else [])]]
            values.append((steps[: scenario.exact], array))
        (steps, a), (other_steps, b) = values
        if steps != other_steps or a.shape != b.shape:
            wrong.append(f"{name}: steps {steps[:3]}… {len(steps)} and {len(other_steps)}, {a.shape} and {b.shape}")
            continue
        scale = np.nanmax(np.abs(a), initial=0.0) if np.isfinite(a).any() else 0.0
        close = np.isclose(b, a, rtol=1e-4, atol=1e-6 * scale, equal_nan=True)
        if not close.all():
            step, place = np.argwhere(~close)[0]
            wrong.append(f"{name} at step {step}, column {place}: {a[step, place]} on torch, {b[step, place]} here")
    assert not wrong, "\n".join(wrong)


def test_the_diagnosis_is_the_same(both):
    """Causes, their levels and their layers are those of PyTorch."""
    _, expected, found = both

    def causes(facts):
        names = [[name, level, [one.replace("/kernel", ".weight").replace("/bias", ".bias") for one in where]]
                 for name, level, where in facts["causes"]]  # fmt: skip
        return [[name, level, sorted(where)] for name, level, where in names]

    assert causes(found) == causes(expected), found["text"] + "\n\n" + expected["text"]
    for key in ("operations", "softmax_sizes", "products", "shortcuts", "norms"):
        assert found["facts"][0].get(key) == expected["facts"][0].get(key), key
