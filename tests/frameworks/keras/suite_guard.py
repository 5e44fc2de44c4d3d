"""Steps that are left out, on the backend that KERAS_BACKEND names (`test_keras.py` runs this once for each)."""

import contextlib

import keras
import numpy as np
import pytest
from watching import watched

from isograd._changes import CannotApply, SkipBadSteps
from isograd._diagnose import diagnose
from isograd._guard import Guard
from isograd._record import RunFile
from isograd._watch import Shield
from isograd.frameworks.keras import Observer
from isograd.frameworks.keras._apply import remake
from isograd.frameworks.keras._guarding import Skipping
from isograd.frameworks.keras._site import Site

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of Keras on NumPy 2

BACKEND = keras.backend.backend()
EXACT = 0.0 if BACKEND != "jax" else 1e-6
"""XLA joins operations differently once more of their results are read."""

NUMBERS = np.random.default_rng(0)
X = NUMBERS.normal(size=(12, 16, 8)).astype("float32")
Y = (X[..., 0] > 0).astype("int32")
GOOD = list(zip(X, Y, strict=True))


def with_nan():
    x = X[0].copy()
    x[3, 0] = np.nan
    return x, Y[0]


MIXED = [*GOOD[:5], with_nan(), *GOOD[5:9], with_nan(), *GOOD[9:]]
"""The good batches, and two bad ones between them: one at a cheap step, one at a deep one."""


def make_model(optimizer=None, dtype=None, dropout=0.0, **kwargs):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(16, dtype=dtype, use_bias=False),
            keras.layers.BatchNormalization(),
            keras.layers.Activation("tanh"),
            keras.layers.Dropout(dropout),
            keras.layers.Dense(2, name="scores", dtype=dtype),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    if BACKEND == "torch":
        kwargs["jit_compile"] = False
    model.compile(optimizer or keras.optimizers.Adam(1e-2), loss, **kwargs)
    return model


def state_of(model):
    held = [*model.variables, *model.optimizer.variables]
    tensors = {variable.path: keras.ops.convert_to_tensor(variable) for variable in held}
    return {path: keras.ops.convert_to_numpy(tensor) for path, tensor in tensors.items()}


def train(model, batches):
    for x, y in batches:
        model.train_on_batch(x, y)
    return state_of(model)


def train_guarded(folder, model, batches, guard=None):
    with watched(folder, guard=guard or Guard(skip=True)) as seen:
        state = train(model, batches)
    return state, seen.history, seen


def assert_same(found, expected, atol=EXACT, rtol=0.0):
    for (path, one), other in zip(found.items(), expected.values(), strict=True):
        np.testing.assert_allclose(one, other, rtol=rtol, atol=atol, err_msg=path)


def skipped(history):
    return [event.step for event in history.events_of("bad-step-skipped")]


# ---- exactness ------------------------------------------------------------------------------------------------------


def plain():
    return keras.optimizers.Adam(1e-2)


def with_everything():
    return keras.optimizers.AdamW(
        1e-2, use_ema=True, ema_overwrite_frequency=5, global_clipnorm=1.0, gradient_accumulation_steps=3
    )


@pytest.mark.parametrize("optimizer", [plain, with_everything])
def test_a_run_with_bad_batches_ends_like_one_that_never_saw_them(tmp_path, optimizer):
    # Keras draws from PyTorch's own generator there, which no variable of the model holds.
    dropout = 0.0 if BACKEND == "torch" else 0.3
    expected = train(make_model(optimizer(), dropout=dropout), GOOD)
    found, history, seen = train_guarded(tmp_path, make_model(optimizer(), dropout=dropout), MIXED)
    assert_same(found, expected)
    assert skipped(history) == [5, 10]
    event = history.events_of("bad-step-skipped")[0]
    assert event.data["reasons"][0]["layer"].startswith("dense")
    assert "is not finite" in event.data["why"]
    # What was left out is diagnosed all the same.
    causes = {cause.finding.name for cause in diagnose(seen.run.histories, run=seen.run.id).causes}
    assert causes & {"nonfinite-inputs", "invalid-operation"}
    assert not history["weight_nonfinite"].values.any()


def test_with_good_batches_alone_nothing_changes(tmp_path):
    expected = train(make_model(dropout=0.3), GOOD[:6])
    found, history, _ = train_guarded(tmp_path, make_model(dropout=0.3), GOOD[:6])
    assert_same(found, expected)
    assert not skipped(history)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="XLA is a choice on TensorFlow alone")
def test_under_xla(tmp_path):
    # XLA joins operations anew in each program that it compiles.
    expected = train(make_model(jit_compile=True), GOOD)
    found, history, _ = train_guarded(tmp_path, make_model(jit_compile=True), MIXED)
    assert_same(found, expected, atol=1e-6)
    assert skipped(history) == [5, 10]


def test_eagerly(tmp_path):
    expected = train(make_model(run_eagerly=True), GOOD)
    found, history, _ = train_guarded(tmp_path, make_model(run_eagerly=True), MIXED)
    assert_same(found, expected)
    assert skipped(history) == [5, 10]


def test_a_norm_that_overflows_is_no_bad_step(tmp_path):
    """Sums of squares beyond float32, of entries that are not."""

    def large():
        model = make_model(keras.optimizers.SGD(1e-30))
        model.compile(model.optimizer, loss=lambda y, p: 1e25 * keras.ops.sum(p), jit_compile=False)
        return model

    expected = train(large(), GOOD[:3])
    found, history, _ = train_guarded(tmp_path, large(), GOOD[:3])
    assert not skipped(history)
    assert_same(found, expected, atol=0.0, rtol=1e-6)
    assert np.isinf(history["grad_norm"].values).any()


def test_a_dynamic_loss_scale_leaves_out_steps_its_own_way(tmp_path):
    def make():
        inner = keras.optimizers.SGD(1e-2)
        optimizer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=2.0**10)
        return make_model(optimizer, dtype="mixed_float16")

    model = make()
    expected = train(model, MIXED)
    found, history, _ = train_guarded(tmp_path, make(), MIXED)
    assert_same(found, expected, atol=EXACT and 1e-3)
    assert float(keras.ops.convert_to_numpy(model.optimizer.dynamic_scale)) == 2.0**8
    assert not skipped(history)
    assert [event.step for event in history.events_of("step-skipped")] == [5, 10]


# ---- how it is asked for --------------------------------------------------------------------------------------------


def test_as_a_change_it_can_be_undone(tmp_path):
    model, back = make_model(), contextlib.ExitStack()
    with watched(tmp_path) as seen:
        with back:
            Skipping(SkipBadSteps(), Site(model, model.optimizer), back)
            during = train(model, MIXED)
        remake(model)
        after = train(model, MIXED[4:7])
    history = seen.history
    assert all(np.isfinite(value).all() for value in during.values())
    assert skipped(history) == [5, 10]
    assert np.isnan(after[model.layers[0].kernel.path]).all()


def test_the_change_has_no_place_where_the_loss_is_scaled():
    model = make_model(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(1e-2)))
    with pytest.raises(CannotApply, match="by itself"):
        Skipping(SkipBadSteps(), Site(model, model.optimizer), contextlib.ExitStack())


@pytest.mark.parametrize("asked", [{"clip": True}, {"rewind": True}, {"stop": True}, {"lower_learning_rate": 0.5}])
def test_a_guard_that_may_do_more_is_refused(tmp_path, asked):
    file = RunFile.create(tmp_path, meta={}, on_failure=print)
    with pytest.raises(ValueError, match="with skip alone"):
        Observer(file, Shield(print), guard=Guard(skip=True, **asked))
    file.close()


def test_bad_steps_that_go_on_are_said_once(tmp_path):
    bad = with_nan()
    _, history, seen = train_guarded(tmp_path, make_model(), [GOOD[0], *[bad] * 6], Guard(skip=True, patience=3))
    assert skipped(history) == [1, 2, 3, 4, 5, 6]
    assert len(seen.told) == 1
    assert "in a row" in seen.told[0]
