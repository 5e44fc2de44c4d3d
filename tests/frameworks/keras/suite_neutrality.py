"""Training a Keras model ends in the same bits watched and unwatched: weights, optimizer, metrics, random numbers.

On JAX what is read lets the compiler join other operations than it would otherwise: there within 1e-6.
"""

import contextlib
import random

import keras
import numpy as np
import pytest
from keras import layers, ops
from watching import watched

BACKEND = keras.backend.backend()
GENERATOR = np.random.default_rng(0)
TABLE = GENERATOR.normal(size=(40, 5)).astype("float32")
IMAGES = GENERATOR.normal(size=(20, 8, 8, 2)).astype("float32")
WORDS = GENERATOR.integers(0, 9, (20, 6)).astype("int32")
SERIES = GENERATOR.normal(size=(20, 6, 3)).astype("float32")
CLASSES = (TABLE[:, 0] > 0).astype("int32")
VALUES = TABLE[:, :1] * 0.5


def fit(model, x=TABLE, y=CLASSES, **options):
    given = {"epochs": 2, "batch_size": 16, "verbose": 0, **options}
    return model, model.fit(x, y[: len(x)] if isinstance(y, np.ndarray) else y, **given).history


def small(**options):
    model = keras.Sequential([keras.Input((5,)), layers.Dense(6, activation="tanh"), layers.Dense(1)])
    model.compile(**{"optimizer": keras.optimizers.SGD(0.1, momentum=0.9), "loss": "mse", **options})
    return model


# ---- architectures --------------------------------------------------------------------------------------------------


def mlp_with_fused_activations():
    model = keras.Sequential([keras.Input((5,))])
    for activation in ("relu", "tanh", "gelu", "sigmoid", "leaky_relu", None):
        model.add(layers.Dense(7, activation=activation))
    model.add(layers.Activation("elu"))
    model.add(layers.Dropout(0.3))
    model.add(layers.Dense(2, activation="softmax"))
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return fit(model)


def cnn_with_batch_norm_and_shortcut():
    x = inputs = keras.Input((8, 8, 2))
    x = layers.Conv2D(4, 3, padding="same", activation="relu")(x)
    h = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(4, 3, padding="same", use_bias=False)(x)))
    x = layers.Add()([x, h])
    x = layers.MaxPooling2D()(layers.SpatialDropout2D(0.2)(x))
    x = layers.Flatten()(layers.DepthwiseConv2D(2)(x))
    model = keras.Model(inputs, layers.Dense(1, activation="sigmoid")(x))
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True), "binary_crossentropy", metrics=["accuracy"])
    return fit(model, IMAGES)


def lstm_on_words():
    model = keras.Sequential([keras.Input((6,), dtype="int32"), layers.Embedding(9, 4, mask_zero=True)])
    model.add(layers.LSTM(5, return_sequences=True))
    model.add(layers.TimeDistributed(layers.Dense(4, activation="tanh")))
    model.add(layers.LSTM(4, recurrent_dropout=0.2))
    model.add(layers.Dense(2))
    model.compile("rmsprop", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return fit(model, WORDS)


def bidirectional_gru():
    model = keras.Sequential([keras.Input((6, 3)), layers.Bidirectional(layers.GRU(4)), layers.Dense(1)])
    model.compile("adam", "mae")
    return fit(model, SERIES, VALUES)


def attention_block():
    words = keras.Input((6,), dtype="int32")
    x = layers.Embedding(9, 8)(words)
    x = layers.LayerNormalization()(x + layers.MultiHeadAttention(2, 4, dropout=0.1)(x, x))
    x = layers.LayerNormalization()(x + layers.Dense(8)(layers.Dense(12, activation="gelu")(x)))
    model = keras.Model(words, layers.Dense(2)(layers.GlobalAveragePooling1D()(x)))
    # Not Adam: the bias of keys has no gradient but rounding, which Adam makes large.
    model.compile(
        keras.optimizers.SGD(0.05, momentum=0.9), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    return fit(model, WORDS)


def several_inputs_and_outputs_shared_and_frozen():
    left, right = keras.Input((5,), name="left"), keras.Input((5,), name="right")
    shared, frozen = layers.Dense(6, activation="relu"), layers.Dense(6, trainable=False)
    both = layers.Concatenate()([shared(left), frozen(shared(right))])
    scaled = ops.tanh(both) * 2.0
    model = keras.Model([left, right], {"a": layers.Dense(1, name="a")(scaled), "b": layers.Dense(2, name="b")(both)})
    losses = {"a": "mse", "b": keras.losses.SparseCategoricalCrossentropy(from_logits=True)}
    model.compile("adam", losses, loss_weights={"a": 0.5, "b": 2.0}, metrics={"a": ["mae"]})
    return fit(model, {"left": TABLE, "right": TABLE[::-1]}, {"a": VALUES, "b": CLASSES})


class Unbuilt(keras.Model):
    def __init__(self):
        super().__init__()
        self.blocks = [layers.Dense(6, activation="relu", kernel_regularizer="l2") for _ in range(2)]
        self.noise, self.out, self.unused = layers.GaussianNoise(0.1), layers.Dense(1), layers.Dense(3)

    def call(self, x, training=False):
        for block in self.blocks:
            x = block(x)
        self.add_loss(0.01 * ops.mean(ops.square(x)))
        return self.out(self.noise(x, training=training))


def subclassed_and_unbuilt():
    model = Unbuilt()
    model.compile("adamw", "mse")
    return fit(model, TABLE, VALUES)


class OwnStep(keras.Model):
    """A `train_step` as the guides of Keras write it for each backend."""

    def __init__(self):
        super().__init__()
        self.hidden, self.out = layers.Dense(6, activation="tanh"), layers.Dense(1)

    def call(self, x, training=False):
        return self.out(self.hidden(x))

    def train_step(self, *args):
        return {"tensorflow": self._on_tensorflow, "jax": self._on_jax, "torch": self._on_torch}[BACKEND](*args)

    def _on_tensorflow(self, data):
        import tensorflow as tf

        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(y=y, y_pred=self(x, training=True))
        self.optimizer.apply_gradients(
            zip(tape.gradient(loss, self.trainable_variables), self.trainable_variables, strict=True)
        )
        return {"loss": loss}

    def _on_jax(self, state, data):
        import jax

        trainable, others, slots, metrics = state
        x, y = data

        def compute(trainable, others):
            y_pred, others = self.stateless_call(trainable, others, x, training=True)
            return self.compute_loss(x, y, y_pred), others

        (loss, others), gradients = jax.value_and_grad(compute, has_aux=True)(trainable, others)
        trainable, slots = self.optimizer.stateless_apply(slots, gradients, trainable)
        return {"loss": loss}, (trainable, others, slots, metrics)

    def _on_torch(self, data):
        import torch

        x, y = data
        self.zero_grad()
        loss = self.compute_loss(y=y, y_pred=self(x, training=True))
        loss.backward()
        with torch.no_grad():
            self.optimizer.apply([v.value.grad for v in self.trainable_weights], self.trainable_weights)
        return {"loss": loss}


def own_train_step():
    model = OwnStep()
    model.build((None, 5))
    model.compile("adam", "mse")
    return fit(model, TABLE, VALUES)


# ---- ways to train --------------------------------------------------------------------------------------------------


def on_single_batches():
    model = small(metrics=["mae"])
    logs = [model.train_on_batch(TABLE[i : i + 8], VALUES[i : i + 8], return_dict=True) for i in range(0, 40, 8)]
    return model, {"logs": [{name: float(value) for name, value in log.items()} for log in logs]}


def two_models_in_turn():
    first, second = small(), small(optimizer="adam")
    for i in range(0, 40, 8):
        first.train_on_batch(TABLE[i : i + 8], VALUES[i : i + 8])
        second.train_on_batch(TABLE[i : i + 8], first.predict_on_batch(TABLE[i : i + 8]))
    return second, {"other": [np.asarray(w).tolist() for w in first.get_weights()]}


def eagerly():
    if BACKEND == "jax":
        pytest.skip("half a minute, for each operation is compiled by itself")
    return fit(small(run_eagerly=True), TABLE, VALUES)


def by_xla():
    if BACKEND != "tensorflow":
        pytest.skip("JAX always does it, PyTorch cannot")
    return fit(small(jit_compile=True, optimizer="adam"), TABLE, VALUES)


def several_steps_in_one_call():
    if BACKEND == "torch":
        pytest.skip("the torch backend of Keras takes one step in a call")
    return fit(small(steps_per_execution=4), TABLE, VALUES, batch_size=5)


def weighted_and_uneven():
    model = small(loss=keras.losses.BinaryCrossentropy(from_logits=True), weighted_metrics=["accuracy"])
    weights = np.linspace(0.5, 2, 40).astype("float32")
    return fit(model, TABLE, CLASSES[:, None], batch_size=17, sample_weight=weights)


def from_a_generator():
    own = np.random.default_rng(4)  # not the global one: TensorFlow runs ahead in a thread

    def batches():
        while True:
            start = int(own.integers(0, 30))
            yield TABLE[start : start + 8], VALUES[start : start + 8]

    return fit(small(), batches(), None, steps_per_epoch=4, batch_size=None)


def several_fits_and_a_changed_rate():
    model = small(optimizer=keras.optimizers.Adam(0.01))
    _, first = fit(model, TABLE, VALUES)
    model.optimizer.learning_rate = 0.001
    _, second = fit(model, TABLE, VALUES)
    model.layers[0].trainable = False
    model.compile("sgd", "mse")
    _, third = fit(model, TABLE, VALUES)
    return model, {"all": [first, second, third], "evaluated": model.evaluate(TABLE, VALUES, verbose=0)}


def with_callbacks():
    model = small(metrics=["mae"])
    callbacks = [
        keras.callbacks.EarlyStopping(patience=1, min_delta=10.0, restore_best_weights=True),
        keras.callbacks.ReduceLROnPlateau(patience=1, min_delta=10.0),
        keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.9),
        keras.callbacks.TerminateOnNaN(),
    ]
    return fit(model, TABLE, VALUES, epochs=5, callbacks=callbacks, validation_data=(TABLE[:8], VALUES[:8]))


class Stopped(RuntimeError):
    pass


def broken_off_and_resumed():
    def stop(batch, logs):
        if batch == 1:
            raise Stopped

    model = small()
    with contextlib.suppress(Stopped):
        fit(model, TABLE, VALUES, callbacks=[keras.callbacks.LambdaCallback(on_train_batch_end=stop)])
    if BACKEND == "jax":  # where an interrupted fit leaves the model without its values
        model.jax_state_sync()
    return fit(model, TABLE, VALUES)


# ---- optimizers -----------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "clipnorm": lambda: keras.optimizers.SGD(0.1, clipnorm=0.05),
    "global-clipnorm": lambda: keras.optimizers.Adam(0.01, global_clipnorm=0.05),
    "clipvalue": lambda: keras.optimizers.RMSprop(0.01, clipvalue=0.01),
    "accumulation-ema": lambda: keras.optimizers.Adam(0.01, gradient_accumulation_steps=2, use_ema=True),
    "decay-schedule": lambda: keras.optimizers.AdamW(
        keras.optimizers.schedules.CosineDecay(0.01, 6), weight_decay=0.01, amsgrad=True, use_ema=True,
        ema_overwrite_frequency=2,
    ),
    "loss-scale": lambda: keras.optimizers.SGD(0.1, loss_scale_factor=8.0),
}  # fmt: skip


def optimized_by(name):
    def train():
        return fit(small(optimizer=OPTIMIZERS[name]()), TABLE, VALUES)

    return pytest.param(train, id=name)


def mixed_float16():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = keras.Sequential([keras.Input((5,)), layers.Dense(8, activation="relu"), layers.LayerNormalization()])
        model.add(layers.Dense(1, dtype="float32"))
        optimizer = keras.optimizers.LossScaleOptimizer(
            keras.optimizers.SGD(0.1, momentum=0.9), initial_scale=2.0**10, dynamic_growth_steps=3
        )
        model.compile(optimizer, "mse")
        return fit(model, TABLE, VALUES)
    finally:
        keras.config.set_dtype_policy("float32")


PROGRAMS = [
    mlp_with_fused_activations, cnn_with_batch_norm_and_shortcut, lstm_on_words, bidirectional_gru, attention_block,
    several_inputs_and_outputs_shared_and_frozen, subclassed_and_unbuilt, own_train_step, on_single_batches,
    two_models_in_turn, eagerly, by_xla, several_steps_in_one_call, weighted_and_uneven, from_a_generator,
    several_fits_and_a_changed_rate, with_callbacks, broken_off_and_resumed, mixed_float16,
    *map(optimized_by, OPTIMIZERS),
]  # fmt: skip


REGROUPED = {"tensorflow": {cnn_with_batch_norm_and_shortcut}}
"""Where a gradient that is read has other factors joined: TensorFlow's dependency optimizer, at the gamma of a batch
normalization, 1 ulp.
"""


def state_after(train):
    """Everything that training left: name -> array."""
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(1)
    model, logs = train()
    found = {f"model {i} {v.path}": v for i, v in enumerate(model.variables)}
    found |= {f"optimizer {i} {v.path}": v for i, v in enumerate(model.optimizer.variables)}
    found |= {f"metric {i} {v.path}": v for i, v in enumerate(model.metrics_variables)}
    found = {name: np.array(keras.ops.convert_to_numpy(v)) for name, v in found.items()}
    found["next random numbers"] = keras.ops.convert_to_numpy(keras.random.uniform((3,)))
    found["others' random numbers"] = np.array([random.random(), np.random.rand()])
    return found, logs


@pytest.mark.parametrize("train", PROGRAMS)
def test_training_ends_in_the_same_state(train, tmp_path):
    """Weights, optimizer, metrics, seeds and logs of a watched program are those of an unwatched one."""
    expected, logs = state_after(train)
    with watched(tmp_path) as watch:
        found, watched_logs = state_after(train)
    assert found.keys() == expected.keys()
    tolerance = 1e-6 if BACKEND == "jax" or train in REGROUPED.get(BACKEND, ()) else 0.0
    for name, value in expected.items():
        assert value.dtype == found[name].dtype
        np.testing.assert_allclose(found[name], value, rtol=tolerance, atol=tolerance, err_msg=name)
    numbers, watched_numbers = keras.tree.flatten(logs), keras.tree.flatten(watched_logs)
    np.testing.assert_allclose(watched_numbers, numbers, rtol=tolerance, atol=tolerance)
    for history in watch.run.histories:
        assert history.num_steps >= 3
        assert "loss" in history and "signal_norm" in history
    assert not watch.told
    whys = [why for history in watch.run.histories for why in history.unmeasured.values()]
    assert not [why for why in whys if "could not be compiled" in why]
