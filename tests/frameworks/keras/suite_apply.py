"""Changes on Keras models: what an update becomes, inside compiled steps, and what is left when they are undone.

The backend is that of `KERAS_BACKEND`; a process has one.
"""

import contextlib
import os
import warnings

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    keras = pytest.importorskip("keras")

from isograd import _changes as changes
from isograd._changes import CannotApply
from isograd.frameworks.keras import _apply, _stepping
from isograd.frameworks.keras import _describe as describe

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*cupy.*"),
]

RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 6)).astype("float32")
Y = (X[:, :2] * 2).astype("float32")


@contextlib.contextmanager
def applied(*wanted, models=(), optimizers=()):
    """An `Applier` that listens, with lists of what it told."""
    events, refused = [], []
    applier = _apply.Applier(
        wanted,
        on_event=lambda kind, data: events.append((kind, data)),
        on_refusal=refused.append,
        models=models,
        optimizers=optimizers,
    )
    applier.events, applier.refused = events, refused
    applier.listen()
    applier.listen_last()
    try:
        yield applier
    finally:
        applier.undo()


def sequential(activation="tanh", *, is_built=True, output=None):
    keras.utils.set_random_seed(1)
    return keras.Sequential(
        [
            *([keras.Input((6,))] if is_built else []),
            keras.layers.Dense(8, activation=activation, name="a"),
            keras.layers.Dense(8, activation=activation, name="b"),
            keras.layers.Dense(2, activation=output, name="c"),
        ]
    )


def unbuilt(activation="tanh", *, output=None):
    return sequential(activation, is_built=False, output=output)


def functional(activation="tanh", *, output=None):
    keras.utils.set_random_seed(1)
    x = entered = keras.Input((6,))
    x = keras.layers.Dense(8, activation=activation, name="a")(x)
    x = keras.layers.Activation(activation, name="b_activation_own")(keras.layers.Dense(8, name="b")(x))
    x = keras.layers.Dense(2, name="c")(x)
    return keras.Model(entered, x if output is None else keras.layers.Activation(output)(x))


def nested():
    keras.utils.set_random_seed(1)
    x = entered = keras.Input((6,))
    body = keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(8, "tanh", name="a"), keras.layers.Dense(8, "tanh", name="b")]
    )
    return keras.Model(entered, keras.layers.Dense(2, name="c")(body(x)))


def fit(model, *, epochs=1, x=X, y=Y):
    """Losses of the epochs, four steps each, batches in order."""
    return model.fit(x, y, batch_size=16, epochs=epochs, shuffle=False, verbose=0).history["loss"]


# ---- a model whose gradient is 1 at every step ----------------------------------------------------------------------


class Falling(keras.Model):
    """One weight; the loss is `slope` times it."""

    def __init__(self, slope=1.0):
        super().__init__()
        self.slope = slope

    def build(self, shape):
        self.weight = self.add_weight(shape=(1, 1), initializer="zeros", name="weight")

    def call(self, x):
        return self.slope * self.weight + 0 * x

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return keras.ops.mean(y_pred)


def falls(optimizer, steps, *, slope=1.0, between=None):
    """By how much the weight falls at each step."""
    model = Falling(slope)
    model.compile(optimizer)
    one = np.ones((1, 1), "float32")
    weights = [0.0]
    for step in range(steps):
        model.train_on_batch(one, one)
        weights.append(float(model.get_weights()[0][0, 0]))
        if between is not None:
            between(step, model)
    return -np.diff(weights)


SHAPES = ("warm-up", "linear", "step", "exponential", "inverse-sqrt", "cosine")


@pytest.mark.parametrize("shape", SHAPES)
def test_a_schedule_multiplies_the_rate_as_torchs_does(shape):
    """Each shape is the factor of torch's scheduler of that name, step after step, and beyond its end."""
    from isograd.frameworks.torch._multipliers import multiplier_of

    change = changes.ScheduleLearningRate(shape=shape, steps=5, end=0.1)
    torchs, expected = multiplier_of(change), []
    torchs.begin([0.5])
    for _ in range(8):
        expected.append(float(torchs.rate(0, 0.5)))
        torchs.advance()

    with applied(change):
        assert falls(keras.optimizers.SGD(0.5), 8) == pytest.approx(expected, rel=1e-4)


def test_a_factor_and_a_value_act_on_the_programs_own_schedule():
    """A factor multiplies it; a value replaces its first rate, and the shape stays."""
    own = [0.5, 0.25, 0.125]
    for change, expected in (
        (changes.SetHyperparameter(name="lr", factor=0.1), [0.05, 0.025, 0.0125]),
        (changes.SetHyperparameter(name="lr", value=0.1), [0.1, 0.05, 0.025]),
        (changes.ScheduleLearningRate(shape="constant", steps=3), [0.5, 0.5, 0.5]),
    ):
        schedule = keras.optimizers.schedules.ExponentialDecay(0.5, 1, 0.5)
        assert falls(keras.optimizers.SGD(schedule), 3) == pytest.approx(own, rel=1e-4)
        with applied(change):
            assert falls(keras.optimizers.SGD(schedule), 3) == pytest.approx(expected, rel=1e-4)


def test_the_program_sees_its_own_rate_and_what_it_sets_is_what_is_multiplied():
    """A callback that halves the rate it reads halves the program's own, not what a change makes of it."""
    optimizer = keras.optimizers.SGD(0.5)
    seen = []

    def halve(step, model):
        seen.append(
            (float(optimizer.learning_rate), float(keras.ops.convert_to_numpy(_stepping.acting_rate(optimizer))))
        )
        optimizer.learning_rate = float(optimizer.learning_rate) / 2

    with applied(changes.SetHyperparameter(name="lr", factor=0.1)):
        assert falls(optimizer, 3, between=halve) == pytest.approx([0.05, 0.025, 0.0125], rel=1e-4)
    assert seen == [pytest.approx(pair, rel=1e-5) for pair in ((0.5, 0.05), (0.25, 0.025), (0.125, 0.0125))]


def test_a_constant_rate_never_falls_and_comes_back():
    """What a callback lowers stays up as long as the change lasts; then it is what was set last."""
    optimizer = keras.optimizers.SGD(0.25)
    wanted = iter([0.5, 0.25, 0.125])

    def lower(step, model):
        optimizer.learning_rate = next(wanted)

    with applied(changes.ScheduleLearningRate(shape="constant", steps=3)):
        assert falls(optimizer, 3, between=lower) == pytest.approx([0.25, 0.5, 0.5], rel=1e-5)
    assert float(optimizer.learning_rate) == pytest.approx(0.125)


@pytest.mark.parametrize(
    ("change", "slope", "expected"),
    [
        (changes.ClipGradients(method="value", limit=0.5), 3.0, 0.5),
        (changes.ClipGradients(method="norm", limit=0.5), 3.0, 0.5),
        (changes.ClipGradients(method="norm", limit=0.5), 1e30, 0.5),
        (changes.ClipGradients(method="norm", limit=5.0), 3.0, 3.0),
        (changes.ClipGradients(method="tensor-norm", limit=0.5), 3.0, 0.5),
        (changes.ScaleLoss(scale=1024.0), 3.0, 3.0),
    ],
)
def test_a_gradient_is_what_the_change_makes_of_it(change, slope, expected):
    """SGD with rate 1 moves the weight by the gradient: clipped, or scaled there and back."""
    with applied(change):
        assert falls(keras.optimizers.SGD(1.0), 2, slope=slope) == pytest.approx([expected] * 2, rel=1e-4)


def test_penalties_and_limits_of_weights():
    """The penalty adds l1 sign(w) + l2 w to the gradient; a clamped weight stays in its range."""
    with applied(changes.PenalizeWeights(l1=0.25, l2=0.5)):
        assert falls(keras.optimizers.SGD(1.0), 2) == pytest.approx([1.0, 1 - 0.25 - 0.5], rel=1e-4)
    with applied(changes.ClampWeights(limit=1.5)):
        assert falls(keras.optimizers.SGD(1.0), 3) == pytest.approx([1.0, 0.5, 0.0], rel=1e-4)


def test_adaptive_clipping_is_by_the_norm_of_a_units_weights():
    """Every column of a hidden kernel moves by at most the ratio times its norm; the output's kernel is left alone."""
    plain, clipped = sequential(), sequential()
    before = plain.get_weights()
    for model, wanted in ((plain, ()), (clipped, (changes.ClipGradients(method="adaptive", limit=1e-3),))):
        model.compile(keras.optimizers.SGD(1.0), "mse")
        with applied(*wanted):
            model.train_on_batch(X, Y)
    moved = [a - b for a, b in zip(clipped.get_weights(), before, strict=True)]
    free = [a - b for a, b in zip(plain.get_weights(), before, strict=True)]

    norms = np.linalg.norm(before[0], axis=0)
    assert np.linalg.norm(moved[0], axis=0) == pytest.approx(1e-3 * norms, rel=1e-3)
    assert moved[-2] == pytest.approx(free[-2], rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("method", ["value", "norm", "adaptive"])
def test_gradients_that_are_not_finite_are_not_spread(method):
    """One NaN in the last layer's gradient does not reach other weights by clipping."""
    grads = [keras.ops.convert_to_tensor(g) for g in (np.ones((2, 2), "float32"), np.full((2, 2), np.nan, "float32"))]
    from isograd.frameworks.keras._clipping import clip_of

    weights = [keras.Variable(np.ones((2, 2), "float32")) for _ in grads]
    found = clip_of(changes.ClipGradients(method=method, limit=1e-3), frozenset())(grads, weights)

    assert np.isfinite(keras.ops.convert_to_numpy(found[0])).all()
    assert np.isnan(keras.ops.convert_to_numpy(found[1])).all()


def test_clipping_is_of_the_accumulated_gradient_and_of_the_unscaled_one():
    """With accumulation, the mean of the gradients is clipped; under a loss scale, what it was without."""
    change = changes.ClipGradients(method="norm", limit=0.5)
    with applied(change):
        found = falls(keras.optimizers.SGD(1.0, gradient_accumulation_steps=2), 4, slope=3.0)
        assert found == pytest.approx([0.0, 0.5, 0.0, 0.5], abs=1e-5)
    with applied(change):
        scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(1.0), initial_scale=64.0)
        assert falls(scaled, 2, slope=3.0) == pytest.approx([0.5, 0.5], rel=1e-4)


def test_embeddings_are_clipped_with_the_rest():
    """The gradient of an embedding, sparse on TensorFlow, counts rows that are met twice once."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((4,), dtype="int32"), keras.layers.Embedding(3, 2), keras.layers.Flatten(), keras.layers.Dense(1)]
    )
    model.compile(keras.optimizers.SGD(1.0), "mse")
    before = model.get_weights()
    with applied(changes.ClipGradients(method="norm", limit=0.1)):
        model.train_on_batch(np.zeros((8, 4), "int32"), np.full((8, 1), 100.0, "float32"))
    moved = np.concatenate([(a - b).ravel() for a, b in zip(model.get_weights(), before, strict=True)])
    assert np.linalg.norm(moved) == pytest.approx(0.1, rel=1e-3)


# ---- hyperparameters and optimizers ----------------------------------------------------------------------------------


SETTINGS = {
    "momentum": (changes.SetHyperparameter(name="momentum", value=0.9), "SGD", ("SGD", {"momentum": 0.9})),
    "eps": (changes.SetHyperparameter(name="eps", value=0.1), "Adam", ("Adam", {"epsilon": 0.1})),
    "beta2": (changes.SetHyperparameter(name="beta2", value=0.5), "Adam", ("Adam", {"beta_2": 0.5})),
    "decay": (changes.SetHyperparameter(name="weight_decay", value=0.1), "SGD", ("SGD", {"weight_decay": 0.1})),
    "Adam": (
        changes.ReplaceOptimizer(optimizer="Adam", hyperparameters=(("lr", 0.01), ("beta1", 0.8))),
        "SGD",
        ("Adam", {"learning_rate": 0.01, "beta_1": 0.8}),
    ),
    "SGD": (
        changes.ReplaceOptimizer(optimizer="SGD", hyperparameters=(("momentum", 0.9),)),
        "RMSprop",
        ("SGD", {"momentum": 0.9}),
    ),
}


def optimizer_of(name, **options):
    return getattr(keras.optimizers, name)(**{"learning_rate": 0.1, **options})


@pytest.mark.parametrize(("change", "own", "same"), SETTINGS.values(), ids=list(SETTINGS))
def test_an_optimizer_that_is_changed_trains_like_one_that_was_made_so(change, own, same):
    """The program's own object is kept, and so are its weights' ways; undone, it has what it had."""
    expected, changed, optimizer = sequential(), sequential(), optimizer_of(own)
    expected.compile(optimizer_of(same[0], **same[1]), "mse")
    fit(expected)
    changed.compile(optimizer, "mse")
    kind, config = type(optimizer), optimizer.get_config()
    with applied(change) as applier:
        fit(changed)
        assert changed.optimizer is optimizer
        for a, b in zip(changed.get_weights(), expected.get_weights(), strict=True):
            assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
        applier.undo()
        assert type(optimizer) is kind
        assert optimizer.get_config() == config
    fit(changed)


def test_a_change_and_its_undoing_leave_no_trace():
    """Undone before the first step, training has the same bits as without it, and the optimizer no attribute more."""
    plain, changed = sequential(), sequential()
    plain.compile(keras.optimizers.SGD(0.1), "mse")
    fit(plain)
    changed.compile(keras.optimizers.SGD(0.1), "mse")
    with applied(
        changes.ClipGradients(method="norm", limit=0.1), changes.SetHyperparameter(name="lr", factor=0.5)
    ) as one:
        changed.make_train_function()
        assert [kind for kind, _ in one.events] == ["treatment-applied"] * 2
        assert one.undo() == ()
        fit(changed)
    for a, b in zip(changed.get_weights(), plain.get_weights(), strict=True):
        assert np.array_equal(a, b)
    assert not {"_clip_gradients", "_backend_apply_gradients"} & vars(changed.optimizer).keys()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (changes.SetHyperparameter(name="momentum", value=0.5), "Adam has no hyperparameter momentum"),
        (changes.SetHyperparameter(name="weight_decay", factor=0.5), "no weight_decay to multiply"),
        (changes.ReplaceOptimizer(optimizer="LBFGS"), "keras.optimizers has no LBFGS"),
        (changes.ScheduleLearningRate(shape="plateau", steps=5), "ReduceLROnPlateau"),
        (changes.ClipGradients(method="percentile", limit=10), "history"),
        (changes.ZeroGradients(), "afresh"),
        (changes.AverageAccumulation(), "averages"),
        (changes.RegisterParameters(), "trains every variable"),
        (changes.ClipUpdates(), "nothing between"),
        (changes.InsertShortcuts(kind="dense"), "another model"),
        (changes.ReplaceActivations(sources=("relu",), target="gelu"), "No hidden layer"),
        (changes.RemoveOutputActivation(kind="softmax"), "no softmax"),
        (changes.RaisePrecision(), "float32 or wider already"),
        (changes.ReinitializeLayers(method="forget-bias"), "No recurrent layer"),
    ],
)
def test_what_has_no_place_is_refused_in_a_sentence_before_the_first_step(change, words):
    """Training goes on as without the change."""
    plain, model = sequential(), sequential()
    for one in (plain, model):
        one.compile(keras.optimizers.Adam(0.01), "mse")
    fit(plain)
    with applied(change) as applier:
        fit(model)
        assert [words in sentence and sentence.endswith(".") for sentence in applier.refused] == [True]
        assert [kind for kind, _ in applier.events] == ["treatment-refused"]
    for a, b in zip(model.get_weights(), plain.get_weights(), strict=True):
        assert a == pytest.approx(b, abs=1e-6)


# ---- programs that run already ---------------------------------------------------------------------------------------


def test_a_running_program_is_changed_and_put_back():
    """From the next step on, and back: within one `fit`, from a callback, also where JAX carries the state."""
    model, undone = sequential(), []
    model.compile(keras.optimizers.SGD(0.1), "mse")
    applier = _apply.Applier(
        [changes.SetHyperparameter(name="lr", factor=0.0)],
        on_event=lambda kind, data: undone.append(kind),
        on_refusal=print,
        models=[model],
    )

    class Change(keras.callbacks.Callback):
        losses = ()

        def on_train_batch_end(self, batch, logs=None):
            self.losses = (*self.losses, [w.copy() for w in self.weights()])
            if batch == 0:
                applier.adopt_running()
            if batch == 2:
                applier.undo()

        def weights(self):
            if keras.backend.backend() == "jax":
                self.model.jax_state_sync()
            return self.model.get_weights()

    seen = Change()
    model.fit(X, Y, batch_size=16, shuffle=False, verbose=0, callbacks=[seen])
    first, second, third, fourth = seen.losses
    assert np.array_equal(first[0], second[0])
    assert np.array_equal(second[0], third[0])
    assert not np.array_equal(third[0], fourth[0])
    assert undone == ["treatment-applied", "treatment-undone"]


def test_a_running_program_that_has_no_place_for_one_of_the_changes_stays_as_it_is():
    """CannotApply, a sentence, with nothing changed and no event."""
    model, told = sequential(), []
    model.compile(keras.optimizers.SGD(0.1), "mse")
    fit(model)
    wanted = [changes.ClipGradients(method="norm", limit=1e-9), changes.ZeroGradients()]
    applier = _apply.Applier(wanted, on_event=lambda *event: told.append(event), on_refusal=told.append, models=[model])
    with pytest.raises(CannotApply, match="afresh"):
        applier.adopt_running()
    assert told == []
    before = model.get_weights()
    fit(model)
    assert not np.allclose(before[0], model.get_weights()[0])


def test_nothing_is_compiled_anew_at_each_step():
    """A schedule runs through one trace of the step."""
    traces = []

    class Counting(keras.Model):
        def build(self, shape):
            self.dense = keras.layers.Dense(2)
            self.dense.build(shape)

        def call(self, x):
            traces.append(1)
            return self.dense(x)

    model = Counting()
    model.compile(keras.optimizers.SGD(0.1), "mse")
    with applied(
        changes.ScheduleLearningRate(shape="cosine", steps=20), changes.ClipGradients(method="norm", limit=1.0)
    ):
        fit(model)
        first = len(traces)
        fit(model, epochs=3)
    assert keras.backend.backend() == "torch" or len(traces) == first


def test_a_model_that_is_compiled_anew_has_its_new_optimizer_changed():
    """The second phase of a training is changed like the first, and the model itself once."""
    model = sequential()
    wanted = changes.SetHyperparameter(name="lr", factor=0.0), changes.ReinitializeLayers(method="xavier")
    with applied(*wanted) as applier:
        for optimizer in (keras.optimizers.SGD(0.1), keras.optimizers.Adam(0.1)):
            model.compile(optimizer, "mse")
            fit(model)
            rate = keras.ops.convert_to_numpy(_stepping.acting_rate(optimizer))
            assert float(rate) == 0
        told = [data["change"]["change"] for kind, data in applier.events if kind == "treatment-applied"]
        assert sorted(told) == ["ReinitializeLayers", "SetHyperparameter", "SetHyperparameter"]


def test_only_the_models_that_are_meant_are_changed():
    """Another model of the process trains as it did."""
    mine, other = sequential(), sequential()
    for model in (mine, other):
        model.compile(keras.optimizers.SGD(0.1), "mse")
    with applied(changes.SetHyperparameter(name="lr", factor=0.0), models=[mine]):
        before = mine.get_weights()
        fit(mine)
        fit(other)
    assert np.array_equal(before[0], mine.get_weights()[0])
    assert not np.array_equal(before[0], other.get_weights()[0])


# ---- models ----------------------------------------------------------------------------------------------------------


def saved_and_loaded(model, tmp_path):
    """The predictions of the model as it is loaded from its file."""
    model.save(tmp_path / "model.keras")
    return keras.models.load_model(tmp_path / "model.keras").predict(X, verbose=0)


MODEL_CHANGES = [
    changes.ReplaceActivations(sources=("tanh",), target="gelu"),
    changes.ReinitializeLayers(method="kaiming"),
    changes.InsertNormalization(kind="batch"),
    changes.InsertNormalization(kind="layer"),
    changes.InsertNormalization(kind="group"),
    changes.InsertNormalization(kind="rms"),
    changes.InsertShortcuts(kind="residual"),
    changes.InsertShortcuts(kind="rezero"),
    changes.StandardizeInputs(batches=2),
]


PLACES = [(make, change) for change in MODEL_CHANGES for make in (sequential, functional)]
PLACES += [(make, change) for change in MODEL_CHANGES[::2] for make in (unbuilt, nested)]


@pytest.mark.parametrize(("make", "change"), PLACES)
def test_a_model_that_is_changed_stays_the_same_object_trains_and_saves(make, change, tmp_path):
    """All its variables learn, its file is that of what it is now, and undone it has the layers that it had."""
    model = make()
    optimizer = keras.optimizers.Adam(0.01)
    model.compile(optimizer, "mse")
    model.build((None, 6))
    names, known = [layer.name for layer in describe.layers_of(model)], len(model.trainable_variables)
    with applied(change) as applier:
        fit(model)
        assert applier.refused == []
        before = [keras.ops.convert_to_numpy(v) for v in model.trainable_variables]
        fit(model)
        after = [keras.ops.convert_to_numpy(v) for v in model.trainable_variables]
        if change != changes.InsertNormalization(kind="group"):  # groups of one unit are all 0
            assert not any(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
        inserts = isinstance(change, (changes.InsertNormalization,)) or change == changes.InsertShortcuts(kind="rezero")
        assert (len(after) > known) == inserts
        assert model.optimizer is optimizer
        assert saved_and_loaded(model, tmp_path) == pytest.approx(model.predict(X, verbose=0), rel=1e-3, abs=1e-5)
        assert len(applier.undo()) == 1
        assert [layer.name for layer in describe.layers_of(model)] == names
        fit(model)
    assert len(model.trainable_variables) == known


def test_an_activation_that_is_replaced_is_that_of_hidden_layers():
    """Fused, as a layer `Activation`, as a layer of its own class; the output's stays."""
    x = entered = keras.Input((6,))
    x = keras.layers.Dense(8, activation="relu", name="a")(x)
    x = keras.layers.ReLU(name="b")(keras.layers.Dense(8)(x))
    x = keras.layers.Activation("relu", name="c")(keras.layers.Dense(8)(x))
    model = keras.Model(entered, keras.layers.Dense(2, activation="relu", name="out")(x))
    model.compile("sgd", "mse")
    with applied(changes.ReplaceActivations(sources=("relu",), target="tanh")) as applier:
        fit(model)
        found = [model.get_layer(name).activation.__name__ for name in ("a", "b", "c", "out")]
        assert found == ["tanh", "tanh", "tanh", "relu"]
        applier.undo()
        assert isinstance(model.get_layer("b"), keras.layers.ReLU)
        assert model.get_layer("a").activation.__name__ == "relu"


@pytest.mark.parametrize("make", [sequential, functional])
def test_an_output_activation_is_removed_and_nothing_else(make):
    """With it, the answer cannot be negative; without it, it is."""
    model = make("relu", output="relu")
    model.compile("sgd", "mse")
    with applied(changes.RemoveOutputActivation(kind="relu")):
        fit(model)
        assert (model.predict(X, verbose=0) < 0).any()
        assert model.get_layer("a").activation.__name__ == "relu"


def test_weights_are_drawn_as_the_method_says():
    """He's variance in front of a rectifier, orthogonal matrices, and the same again with the same seed."""

    def drawn(method):
        keras.utils.set_random_seed(3)
        layers = [
            keras.Input((200,)),
            keras.layers.Dense(200, activation="relu"),
            keras.layers.Dense(200),
            keras.layers.Dense(1),
        ]
        model = keras.Sequential(layers)
        model.compile("sgd", "mse")
        with applied(changes.ReinitializeLayers(method=method)) as applier:
            model.make_train_function()
            weights = model.get_weights()
            before = applier.undo()
        assert before == ()
        return weights

    kaiming, again, orthogonal, xavier = (drawn(method) for method in ("kaiming", "kaiming", "orthogonal", "xavier"))
    assert kaiming[0].std() == pytest.approx((2 / 200) ** 0.5, rel=0.03)
    assert kaiming[2].std() == pytest.approx((1 / 200) ** 0.5, rel=0.03)
    assert all(np.array_equal(a, b) for a, b in zip(kaiming, again, strict=True))
    assert orthogonal[2].T @ orthogonal[2] == pytest.approx(np.eye(200), abs=1e-4)
    assert np.abs(xavier[0]).max() == pytest.approx((6 / 400) ** 0.5, rel=0.01)


def test_recurrent_layers_are_drawn_gate_by_gate():
    """Forget biases of 1, chrono biases that mirror each other, orthogonal gates, the identity."""

    def drawn(layer, method):
        model = keras.Sequential([keras.Input((30, 3)), layer, keras.layers.Dense(2)])
        model.compile("sgd", "mse")
        with applied(changes.ReinitializeLayers(method=method)) as applier:
            model.make_train_function()
            assert applier.refused == []
            return layer.cell.get_weights()

    lstm = drawn(keras.layers.LSTM(5, unit_forget_bias=False), "forget-bias")
    assert list(lstm[2]) == [0] * 5 + [1] * 5 + [0] * 10
    chrono = drawn(keras.layers.LSTM(5), "chrono")[2]
    assert chrono[5:10] == pytest.approx(-chrono[:5])
    assert 0 < chrono[5:10].max() <= np.log(29)
    gates = drawn(keras.layers.GRU(5, recurrent_initializer="zeros"), "orthogonal")[1]
    for gate in np.split(gates, 3, axis=1):
        assert gate.T @ gate == pytest.approx(np.eye(5), abs=1e-5)
    assert np.array_equal(drawn(keras.layers.SimpleRNN(5), "identity-recurrence")[1], np.eye(5))


def test_inputs_are_standardized_by_the_first_batches():
    """The moments are those of the first two batches; the file holds a layer of Keras's own."""
    x = (X * [1, 10, 100, 1, 1, 1] + [0, 1000, 0, 0, 0, 5]).astype("float32")
    model = sequential()
    model.compile("sgd", "mse")
    with applied(changes.StandardizeInputs(batches=2)):
        fit(model, x=x, epochs=2)
        layer = next(one for one in model.layers if isinstance(one, keras.layers.Normalization))
        assert type(layer) is keras.layers.Normalization
        assert keras.ops.convert_to_numpy(layer.adapt_mean) == pytest.approx(x[:32].mean(0), rel=1e-3, abs=1e-3)
        assert keras.ops.convert_to_numpy(layer.adapt_variance) == pytest.approx(x[:32].var(0), rel=1e-3)


def test_a_model_of_half_precision_computes_in_float32():
    """Layers that compute in half precision no longer do."""
    policy = "mixed_bfloat16"
    model = keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(8, dtype=policy), keras.layers.Dense(2, dtype=policy)]
    )
    model.compile("sgd", "mse")
    with applied(changes.RaisePrecision()) as applier:
        fit(model)
        assert {layer.compute_dtype for layer in model.layers} == {"float32"}
        applier.undo()
        assert {layer.compute_dtype for layer in model.layers} == {"bfloat16"}


class Own(keras.Model):
    """A model that says in `call` what it computes."""

    def __init__(self):
        super().__init__()
        self.first, self.last = keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(2)

    def call(self, x):
        return self.last(self.first(x))


@pytest.mark.parametrize(
    "change",
    [changes.InsertNormalization(kind="layer"), changes.InsertShortcuts(kind="residual"), changes.StandardizeInputs()],
)
def test_a_subclassed_model_takes_no_layers(change):
    """Its `call` cannot be seen; its activations and weights can be changed all the same."""
    model = Own()
    model.compile("sgd", "mse")
    with applied(change, changes.ReplaceActivations(sources=("tanh",), target="relu")) as applier:
        fit(model)
        assert ["`call`" in sentence for sentence in applier.refused] == [True]
        assert model.first.activation.__name__ == "relu"


def test_convolutions_are_normalized_over_channels_and_shortcuts_go_around_them():
    """A small residual network, trained and saved."""
    x = entered = keras.Input((8, 8, 3))
    for name in ("a", "b", "c"):
        x = keras.layers.Conv2D(4, 3, padding="same", activation="relu", name=name)(x)
    model = keras.Model(entered, keras.layers.Dense(1)(keras.layers.GlobalAveragePooling2D()(x)))
    model.compile("adam", "mse")
    images = RNG.normal(size=(16, 8, 8, 3)).astype("float32")
    with applied(changes.InsertNormalization(kind="layer"), changes.InsertShortcuts(kind="rezero")) as applier:
        model.fit(images, images[:, 0, 0, :1], verbose=0)
        details = [data["detail"] for kind, data in applier.events if kind == "treatment-applied"]
        assert details == ["behind 3 layers", "around 2 layers"]
        assert isinstance(model.get_layer("b_normalization"), keras.layers.GroupNormalization)


@pytest.mark.parametrize("loss", ["mse", "mae"])
@pytest.mark.parametrize("make", [sequential, functional])
def test_targets_are_standardized_by_the_first_batches_and_answers_are_in_their_units(make, loss, tmp_path):
    """Training is that of the standardized targets; the loss, the answers and the file are in the program's units."""
    shift, scale = np.array([100.0, -50.0], "float32"), np.array([20.0, 5.0], "float32")
    far = Y[:16] * scale + shift  # one batch, so that its statistics are those of the whole
    near = (far - far.mean(0)) / far.std(0)
    plain, model = make(), make()
    for one in (plain, model):
        one.compile(keras.optimizers.Adam(0.01), loss)
    plain.fit(X[:16], near, batch_size=16, epochs=5, verbose=0)
    with applied(changes.StandardizeTargets(batches=1)) as applier:
        model.fit(X[:16], far, batch_size=16, epochs=5, verbose=0)
        assert applier.refused == []
        answers = model.predict(X, verbose=0)
        assert answers == pytest.approx(plain.predict(X, verbose=0) * far.std(0) + far.mean(0), rel=2e-2, abs=0.3)
        assert saved_and_loaded(model, tmp_path) == pytest.approx(answers, rel=1e-4)
        assert applier.undo() == ("The weights have been trained on standardized targets.",)
    assert "compute_loss" not in vars(model)


def test_targets_of_classes_are_not_standardized():
    """There is no regression loss."""
    model = sequential(output="softmax")
    model.compile("sgd", "sparse_categorical_crossentropy")
    with applied(changes.StandardizeTargets()) as applier:
        model.fit(X, np.zeros(64), verbose=0)
        assert ["no regression loss" in sentence for sentence in applier.refused] == [True]
