"""Loops that a program writes itself with TensorFlow (`test_tensorflow.py` runs this in a process of its own)."""

import contextlib
import math

import keras
import numpy as np
import pytest
import tensorflow as tf

from isograd._diagnose import diagnose
from isograd._guard import Guard
from isograd._record import RunFile
from isograd._schedule import Schedule
from isograd._watch import Shield
from isograd.frameworks.keras import Observer as KerasObserver
from isograd.frameworks.tensorflow import Observer, describe_run, sort, step

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of Keras on NumPy 2

NUMBERS = np.random.default_rng(0)
X = NUMBERS.normal(size=(12, 16, 8)).astype("float32")
Y = (X[..., 0] > 0).astype("int32")
BATCHES = [(tf.constant(x), tf.constant(y)) for x, y in zip(X, Y, strict=True)]


class EveryOther(Schedule):
    """Deep and cheap steps in turn."""

    def is_deep(self, step):
        return step % 2 == 0


class Watched:
    """What came of a watch."""

    def __init__(self, file, observer, told):
        self.file, self.observer, self.told = file, observer, told

    @property
    def run(self):
        self.observer.drain()
        return self.file.read()

    @property
    def history(self):
        (history,) = self.run.histories
        return history


@contextlib.contextmanager
def watched(folder, cls=Observer, **options):
    failures, told = [], []
    file = RunFile.create(folder, meta={"framework": "tensorflow"}, on_failure=failures.append)
    observer = cls(file, Shield(failures.append), **{"make_schedule": EveryOther, "on_warning": told.append, **options})
    observer.attach()
    try:
        yield Watched(file, observer, told)
    finally:
        observer.detach()
    assert not failures, failures


def make_model(activation="tanh", dropout=0.2):
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(16, activation=activation, name="hidden"),
            keras.layers.Dropout(dropout, name="dropout"),
            keras.layers.Dense(2, name="scores"),
        ]
    )


def make_step(model, optimizer, loss_of=None):
    loss_of = loss_of or keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def train_step(x, y):
        with tf.GradientTape() as tape:
            loss = loss_of(y, model(x, training=True))
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss

    return train_step


def weights_of(model):
    return [variable.numpy() for variable in model.variables]


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


COMPILERS = {
    "eager": lambda function: function,
    "graph": tf.function,
    "xla": lambda function: tf.function(function, jit_compile=True),
}


# ---- with an optimizer of Keras -------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiler", COMPILERS)
def test_training_ends_in_the_same_bits(tmp_path, compiler):
    def train():
        model = make_model()
        train_step = COMPILERS[compiler](make_step(model, keras.optimizers.Adam(1e-2)))
        losses = [float(train_step(x, y)) for x, y in BATCHES]
        return weights_of(model), losses

    expected, losses = train()
    with watched(tmp_path) as seen:
        found, _ = train()
    history = seen.history
    if compiler == "xla":  # which joins operations anew once more of their results are read
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)
    else:
        assert_same(found, expected)
    assert history.subject == "model"
    np.testing.assert_allclose(history["loss"].values, losses, rtol=1e-5)
    assert [p.name for p in history.parameters if p.optimized][-2:] == ["scores/kernel", "scores/bias"]
    np.testing.assert_allclose(history["learning_rate"].values, 1e-2, rtol=1e-6)
    assert history.groups[0]["optimizer"] == "Adam"


def test_gradients_and_updates_against_sgd(tmp_path):
    model = make_model()
    first = [variable.numpy() for variable in model.trainable_variables]
    with watched(tmp_path) as seen:
        train_step = make_step(model, keras.optimizers.SGD(0.1))
        for x, y in BATCHES:
            train_step(x, y)
    history = seen.history
    norms = [np.linalg.norm(weight.astype("float64")) for weight in first]
    np.testing.assert_allclose(history["weight_norm"].values[0], norms, rtol=1e-6)
    assert history["update_norm"].steps.tolist() == [0, 2, 4, 6, 8, 10]
    gradients = history["grad_norm"].values[history["update_norm"].steps]
    np.testing.assert_allclose(history["update_norm"].values, 0.1 * gradients, rtol=1e-4)


def test_layers_are_read_in_eager_loops(tmp_path):
    model = make_model("sigmoid", dropout=0.0)
    with watched(tmp_path) as seen:
        make_step(model, keras.optimizers.SGD(0.1))(*BATCHES[0])
        model(BATCHES[1][0])  # no tape: not a part of the next step
        make_step(model, keras.optimizers.SGD(0.0))(*BATCHES[1])
    history = seen.run.histories[0]
    names = [layer.name for layer in history.layers]
    assert names == ["input", "hidden", "hidden.sigmoid", "dropout", "scores", "loss.prediction", "loss.target"]
    assert history["output_rms"].values[0, 0] == pytest.approx(float(np.sqrt(np.mean(X[0] ** 2))), rel=1e-5)
    kernel = history.parameters[[p.name for p in history.parameters].index("scores/kernel")]
    assert kernel.layer == "scores"
    assert (history["calls"].values == 1).all()
    assert history["signal_norm"].values[0, names.index("hidden")] > 0
    assert history.events_of("loss-graph")[0].data["operations"][:2] == ["NllLoss", "LogSoftmax"]


def test_signals_are_gradients_of_outputs(tmp_path):
    model = make_model(dropout=0.0)
    x, y = BATCHES[0]
    hidden, scores = model.layers[0], model.layers[-1]
    with tf.GradientTape() as tape:
        h = hidden(x)
        tape.watch(h)
        p = scores(h)
        loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(y, p))
    expected = [float(tf.norm(gradient)) for gradient in tape.gradient(loss, [h, p])]
    with watched(tmp_path) as seen:
        make_step(model, keras.optimizers.SGD(0.1))(x, y)
    history = seen.history
    names = [layer.name for layer in history.layers]
    found = [history["signal_norm"].values[0, names.index(name)] for name in ("hidden.tanh", "scores")]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_in_a_function_of_the_programs_own_only_gradients_are_read_and_it_says_so(tmp_path):
    def train():
        train_step = tf.function(make_step(make_model(), keras.optimizers.SGD(0.1)))
        for x, y in BATCHES:
            train_step(x, y)
        return train_step

    traces = train().experimental_get_tracing_count()
    with watched(tmp_path) as seen:
        train_step = train()
    history = seen.history
    assert len(history["grad_norm"]) == len(BATCHES)
    assert "weight_norm" not in history.series
    assert "tf.function" in history.unmeasured["output_rms"]
    # A function in whose first trace variables are made, which what is read needs, is traced once more.
    assert train_step.experimental_get_tracing_count() <= traces + 1
    train_step(*BATCHES[0])  # what it was traced with still works
    assert len(history["grad_norm"]) == len(BATCHES)


def test_many_steps_in_one_call(tmp_path):
    model = make_model()
    train_step = make_step(model, keras.optimizers.SGD(0.1))

    @tf.function
    def epoch(xs, ys):
        for x, y in tf.data.Dataset.from_tensor_slices((xs, ys)):
            train_step(x, y)

    with watched(tmp_path) as seen:
        epoch(X, Y)
        epoch(X, Y)
    assert seen.history["grad_norm"].steps.tolist() == list(range(2 * len(X)))


def test_a_loss_scale_is_divided_out(tmp_path):
    model = make_model(dropout=0.0)
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=1024.0)
    x, y = BATCHES[0]
    with watched(tmp_path) as seen:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(y, model(x)))
            scaled = optimizer.scale_loss(loss)
        gradients = tape.gradient(scaled, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)
    history = seen.history
    assert len(history["loss"]) == 1
    assert history["loss"].values[0] == pytest.approx(float(loss), rel=1e-5)
    expected = [float(tf.norm(gradient)) / 1024 for gradient in gradients]
    np.testing.assert_allclose(history["grad_norm"].values[0], expected, rtol=1e-5)


def test_two_networks_are_two_subjects(tmp_path):
    keras.utils.set_random_seed(0)
    generator = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, activation="tanh", name="draw")])
    critic = keras.Sequential([keras.Input((8,)), keras.layers.Dense(1, name="judge")])
    ours, theirs = keras.optimizers.SGD(0.1), keras.optimizers.SGD(0.1)
    noise = tf.constant(X[0, :, :4])
    with watched(tmp_path) as seen:
        for x, _ in BATCHES[:4]:
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(critic(generator(noise))) - tf.reduce_mean(critic(x))
            theirs.apply(tape.gradient(loss, critic.trainable_variables), critic.trainable_variables)
            with tf.GradientTape() as tape:
                loss = -tf.reduce_mean(critic(generator(noise)))
            ours.apply(tape.gradient(loss, generator.trainable_variables), generator.trainable_variables)
    histories = {history.subject: history for history in seen.run.histories}
    assert set(histories) == {"critic", "generator"}
    layers = {name: [layer.name for layer in h.layers if layer.role == "module"] for name, h in histories.items()}
    assert layers == {"critic": ["judge"], "generator": ["draw"]}
    judged = histories["critic"]
    calls = judged["calls"].values[:, [layer.name for layer in judged.layers].index("judge")]
    assert calls.tolist() == [2.0, 2.0]
    assert all(len(history["loss"]) == 4 for history in histories.values())


def test_micro_batches_are_one_step(tmp_path):
    model = make_model()
    optimizer = keras.optimizers.SGD(0.1)
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    losses, total = [], None
    with watched(tmp_path) as seen:
        for x, y in BATCHES[:3]:
            with tf.GradientTape() as tape:
                loss = loss_of(y, model(x))
            gradients = tape.gradient(loss, model.trainable_variables)
            total = gradients if total is None else [a + b for a, b in zip(total, gradients, strict=True)]
            losses.append(float(loss))
        optimizer.apply([g / 3 for g in total], model.trainable_variables)
    history = seen.history
    assert history["micro_batches"].values.tolist() == [3.0]
    assert history["loss"].values[0] == pytest.approx(np.mean(losses), rel=1e-5)


def test_what_fit_trains_is_left_to_the_observer_of_models(tmp_path):
    model = make_model()
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    with watched(tmp_path / "loops") as loops, watched(tmp_path / "models", KerasObserver) as models:
        model.fit(X[0], Y[0], batch_size=4, verbose=0)
        assert not loops.observer.subjects
        make_step(model, keras.optimizers.SGD(0.1))(*BATCHES[0])
    assert len(loops.history["loss"]) == 1
    assert len(models.history["loss"]) == 4


def test_only_what_was_asked_for_is_watched(tmp_path):
    wanted, other = make_model(), make_model()
    with watched(tmp_path, models=(wanted,)) as seen:
        for model in (other, wanted):
            make_step(model, keras.optimizers.SGD(0.1))(*BATCHES[0])
    assert seen.observer.subjects == ["wanted"]


def test_afterwards_everything_is_as_it_was(tmp_path):
    places = [
        (tf.GradientTape, "__enter__"),
        (tf.GradientTape, "__exit__"),
        (tf.GradientTape, "gradient"),
        (keras.losses.Loss, "__call__"),
        (keras.optimizers.LossScaleOptimizer, "apply"),
        (type(tf.function(abs)), "__call__"),
    ]
    before = [vars(cls)[name] for cls, name in places]
    with watched(tmp_path / "a") as first:
        with watched(tmp_path / "b") as second:
            make_step(make_model(), keras.optimizers.SGD(0.1))(*BATCHES[0])
        make_step(make_model(), keras.optimizers.SGD(0.1))(*BATCHES[0])
    assert [vars(cls)[name] for cls, name in places] == before
    assert len(first.run.histories) == 2
    assert len(second.run.histories) == 1


# ---- a guard --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiler", ["eager", "graph"])
def test_bad_steps_are_left_out(tmp_path, compiler):
    x = X[0].copy()
    x[0, 0] = np.nan
    mixed = [*BATCHES[:5], (tf.constant(x), BATCHES[0][1]), *BATCHES[5:]]

    def train(batches):
        model, optimizer = make_model(dropout=0.0), keras.optimizers.Adam(1e-2)
        train_step = COMPILERS[compiler](make_step(model, optimizer))
        for batch in batches:
            train_step(*batch)
        return weights_of(model) + [variable.numpy() for variable in optimizer.variables]

    expected = train(BATCHES)
    with watched(tmp_path, guard=Guard(skip=True)) as seen:
        found = train(mixed)
    assert_same(found, expected)
    assert [event.step for event in seen.history.events_of("bad-step-skipped")] == [5]


# ---- variables assigned to by hand ----------------------------------------------------------------------------------


class Line(tf.Module):
    def __init__(self):
        super().__init__(name="line")
        with self.name_scope:
            self.w = tf.Variable(tf.zeros((8, 1)), name="w")
            self.b = tf.Variable(tf.zeros((1,)), name="b")

    def train_step(self, x, y):
        variables = [self.w, self.b]
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(x @ self.w + self.b - tf.cast(y, tf.float32)[:, None]))
        gradients = tape.gradient(loss, variables)
        step(loss, gradients, variables, learning_rate=0.1, name="line")
        for variable, gradient in zip(variables, gradients, strict=True):
            variable.assign_sub(0.1 * gradient)
        return loss


@pytest.mark.parametrize("compiler", COMPILERS)
def test_steps_by_hand(tmp_path, compiler):
    def train():
        line = Line()
        train_step = COMPILERS[compiler](line.train_step)
        losses = [float(train_step(x, y)) for x, y in BATCHES]
        return [line.w.numpy(), line.b.numpy()], losses

    expected, losses = train()
    with watched(tmp_path) as seen:
        found, _ = train()
    history = seen.history
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6 if compiler == "xla" else 0)
    assert history.subject == "line"
    assert [(p.name, p.layer) for p in history.parameters] == [("line/w", "line"), ("line/b", "line")]
    np.testing.assert_allclose(history["loss"].values, losses, rtol=1e-5)
    np.testing.assert_allclose(history["learning_rate"].values, 0.1, rtol=1e-6)
    if compiler == "eager":
        gradients = history["grad_norm"].values[history["update_norm"].steps]
        np.testing.assert_allclose(history["update_norm"].values, 0.1 * gradients, rtol=1e-4)


def test_without_a_watch_step_does_nothing():
    line = Line()
    line.train_step(*BATCHES[0])
    assert math.isfinite(float(line.b[0]))


# ---- what it is for -------------------------------------------------------------------------------------------------


def test_a_sick_loop_is_diagnosed(tmp_path):
    keras.utils.set_random_seed(0)
    deep = [keras.layers.Dense(16, activation="sigmoid") for _ in range(12)]
    model = keras.Sequential([keras.Input((8,)), *deep, keras.layers.Dense(2)])
    with watched(tmp_path) as seen:
        train_step = make_step(model, keras.optimizers.SGD(0.1))
        for x, y in BATCHES * 3:
            train_step(x, y)
    found = diagnose(seen.run.histories, run=seen.run.id)
    names = {cause.finding.name for cause in found.causes} | {
        s for cause in found.causes for s in map(str, cause.symptoms)
    }
    assert not found.healthy
    assert any("vanishing-gradients" in name or "saturating-activations" in name for name in names), names


def test_what_is_watched_is_sorted():
    model, optimizer = make_model(), keras.optimizers.SGD(0.1)
    assert sort([optimizer, model]) == ((model,), (optimizer,), ())
    with pytest.raises(ValueError, match="models and optimizers"):
        sort([3])
    assert describe_run()["framework"] == "tensorflow"
