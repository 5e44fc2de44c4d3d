"""The code that remedies print for Keras programs: every piece runs on a small model, which trains afterwards."""

import os
import warnings

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    keras = pytest.importorskip("keras")

from isograd._changes import ScheduleShape
from isograd._history import History, Layer, Parameter, Series
from isograd._remedy import Inapplicable
from isograd._treat import treatment_of
from isograd.remedies import REMEDIES

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*cupy.*"),
]

X = np.random.default_rng(0).normal(size=(32, 6)).astype("float32")
Y = X[:, :1] * 2


def built(output=None):
    """The program's model: fused and separate activations, equal sizes, perhaps an output activation."""
    keras.utils.set_random_seed(0)
    x = entered = keras.Input((6,))
    x = keras.layers.Dense(8, activation="tanh", name="dense")(x)
    x = keras.layers.Dense(8, activation="tanh", name="dense_1")(x)
    x = keras.layers.Activation("tanh", name="activation")(keras.layers.Dense(8, name="dense_2")(x))
    x = keras.layers.Dense(1, activation=output, name="dense_3")(x)
    return keras.Model(entered, x)


def recorded():
    """What is recorded of it."""
    layers, position = [Layer(name="input", kind="input", type="float32", role="input", units=6)], 0
    for name, fused in (("dense", True), ("dense_1", True), ("dense_2", False), ("dense_3", False)):
        units = 1 if name == "dense_3" else 8
        position += 1
        layers.append(Layer(name=name, kind="linear", type="Dense", units=units, shape=(32, units), position=position))
        if fused:
            position += 1
            operation = {"kind": "tanh", "type": "tanh", "role": "operation", "units": 8}
            layers.append(Layer(name=f"{name}.tanh", shape=(32, 8), position=position, **operation))
        if name == "dense_2":
            position += 1
            layers.append(Layer(name="activation", kind="tanh", type="Activation", units=8, position=position))
    layers.append(Layer(name="target", kind="target", type="float32", role="target", units=1, position=position + 1))
    steps = np.arange(10)
    return History(
        layers=tuple(layers),
        parameters=(Parameter(name="dense/kernel", layer="dense", shape=(6, 8)),),
        groups=({"optimizer": "Adam", "lr": 0.01, "betas": [0.9, 0.999], "eps": 1e-7, "weight_decay": 0.0},),
        series={"global_grad_norm": Series(steps, np.linspace(1, 2, 10))},
        meta={"framework": "keras"},
    )


def namespace(model, tmp_path):
    """The names that a program has where such code is pasted."""
    optimizer = keras.optimizers.Adam(0.01)
    model.compile(optimizer, "mse")
    path, kept = tmp_path / "model.keras", built()
    kept.compile("adam", "mse")
    kept.train_on_batch(X, Y)
    kept.save(path)
    token = keras.random.normal((2, 3, 8), seed=1)
    return {
        "keras": keras, "np": np, "x": X, "y": Y, "model": model, "optimizer": optimizer, "lr": 0.01, "path": path,
        "backbone": model.get_layer("dense"), "state": token, "query": token, "key": token, "values": token,
        "scores": keras.ops.ones((2, 3, 3)), "num_heads": 2, "key_dim": 4,
        "feedforward": keras.layers.Dense(8), "blocks": [keras.layers.Dense(6) for _ in range(2)],
    }  # fmt: skip


ADVICE = {"move-normalization", "zero-gradients"}
"""Code for a place that this program has not got: the inside of a block, a loop of one's own."""

FORMS = [
    *REMEDIES,
    *(f"schedule-learning-rate:shape={shape}" for shape in ScheduleShape.__args__),
    *(f"change-optimizer:optimizer={name}" for name in ("SGD", "RMSprop", "NAdam", "AdamW", "Adagrad", "RAdam")),
    *(f"insert-normalization:kind={kind}" for kind in ("layer", "group", "rms")),
    *(f"insert-shortcuts:kind={kind}" for kind in ("residual", "dense")),
    *(f"reinitialize-layers:method={method}" for method in ("xavier", "orthogonal", "critical", "forget-bias")),
    *(f"replace-activations:target={target}" for target in ("gelu", "leaky-relu", "elu")),
    "clip-gradient-by-history:method=z-score",
    "stabilize-optimizer:eps=0.0001,beta2=0.9,clip=0",
    "remove-output-activation:kind=tanh",
    "remove-output-activation:kind=tanh,target=sigmoid",
]


@pytest.mark.parametrize("text", [form for form in FORMS if form not in ADVICE])
def test_printed_code_runs_and_the_model_trains_with_it(text, tmp_path):
    """In the program's own words, on its own model, on every backend."""
    try:
        code = treatment_of([text], recorded()).code
    except Inapplicable:  # for this program; the code is printed all the same where the cause is another
        code = code_of(text)
    assert [] == [line for line in code.splitlines() if len(line) > 78], code
    assert "torch" not in code
    names = namespace(built("tanh" if "remove-output" in text else None), tmp_path)
    for part in code.split("\n\n\n\n"):
        exec(part, names)
    model = names["model"]
    if not model.compiled:
        model.compile(names["optimizer"], "mse")
    losses = model.fit(X, Y[:, :1], batch_size=8, verbose=0).history["loss"]
    assert np.isfinite(losses).all()


def code_of(text):
    """The code of a remedy that this program has no place for."""
    from isograd._treat import parse

    return parse(text).code_for(recorded())


@pytest.mark.parametrize("text", sorted(REMEDIES))
def test_a_program_on_torch_gets_torchs_code(text):
    """The framework that was recorded decides; without one it is torch."""
    remedy = REMEDIES[text]()
    history = recorded()
    torchs = History(layers=history.layers, groups=history.groups)
    assert remedy.code_for(torchs) == remedy.code(torchs)
    assert remedy.code_for(history) == remedy.keras_code(history)


def executed(text, tmp_path, output=None):
    names = namespace(built(output), tmp_path)
    exec(code_of(text), names)
    return names


def test_code_does_what_it_says(tmp_path):
    """Rates, limits, layers and weights are those of the remedy."""
    assert float(executed("lower-learning-rate", tmp_path)["model"].optimizer.learning_rate) == pytest.approx(1e-3)
    assert executed("clip-gradient-norm:max_norm=0.5", tmp_path)["optimizer"].global_clipnorm == 0.5
    replaced = executed("replace-activations", tmp_path)["model"]
    assert {replaced.get_layer(name).activation.__name__ for name in ("dense", "dense_1", "activation")} == {"relu"}
    normalized = executed("insert-normalization", tmp_path)["model"]
    assert sum(isinstance(layer, keras.layers.BatchNormalization) for layer in normalized.layers) == 3
    shortcuts = executed("insert-shortcuts:kind=residual", tmp_path)["model"]
    assert sum(isinstance(layer, keras.layers.Add) for layer in shortcuts.layers) == 2
    removed = executed("remove-output-activation:kind=tanh", tmp_path, "tanh")["model"]
    assert removed.get_layer("dense_3").activation.__name__ == "linear"
    drawn = executed("reinitialize-layers:method=xavier", tmp_path)["model"]
    assert np.abs(drawn.get_layer("dense").get_weights()[0]).max() <= (6 / 14) ** 0.5
