"""The gradient penalty of a Wasserstein critic, where some samples switch every unit off.

Seen      The loss is NaN.
Cause     The norm of a zero gradient is the root of 0, whose derivative is infinite.
Fix       A small number under the root.
Source    github.com/keras-team/keras-io/issues/910, 624, github.com/pytorch/pytorch/issues/2534
Sure      A: a merged fix
Repaired  Everything finite, and a loss that falls
"""

import keras
import numpy as np
import tensorflow as tf
from _arrays import float32
from _program import all_finite, arguments, verdict
from keras import layers

ACCEPTED = ("singular-derivative",)
UNREACHABLE = "The norm of zero is taken in the program's own penalty."


class Wasserstein(keras.Model):
    def __init__(self, critic, *, eps):
        super().__init__()
        self.critic, self.eps = critic, eps
        self.loss_tracker = keras.metrics.Mean(name="loss")

    def gradient_penalty(self, real, fake):
        share = tf.random.uniform((tf.shape(real)[0], 1))
        between = share * real + (1 - share) * fake
        with tf.GradientTape() as tape:
            tape.watch(between)
            scores = self.critic(between, training=True)
        slope = tape.gradient(scores, between)
        norm = tf.sqrt(tf.reduce_sum(tf.square(slope), axis=1) + self.eps)
        return tf.reduce_mean((norm - 1.0) ** 2)

    def train_step(self, real):
        fake = 0.3 * tf.random.normal(tf.shape(real))
        with tf.GradientTape() as tape:
            cost = tf.reduce_mean(self.critic(fake, training=True)) - tf.reduce_mean(self.critic(real, training=True))
            loss = cost + 10 * self.gradient_penalty(real, fake)
        grads = tape.gradient(loss, self.critic.trainable_variables)
        self.optimizer.apply_gradients(zip(grads, self.critic.trainable_variables, strict=True))
        self.loss_tracker.update_state(loss)
        return {"loss": self.loss_tracker.result()}


def main():
    args = arguments(__doc__)
    keras.utils.set_random_seed(args.seed)
    real = float32(0.3 * np.random.default_rng(0).standard_normal((640, 2)) + 1)
    bias = keras.initializers.Constant(-0.45)
    critic = keras.Sequential(
        [keras.Input((2,)), layers.Dense(32, activation="relu", bias_initializer=bias), layers.Dense(1)]
    )
    model = Wasserstein(critic, eps=1e-12 if args.fixed else 0.0)
    model.compile(optimizer=keras.optimizers.Adam(1e-3))
    history = model.fit(real, batch_size=64, epochs=8, verbose=0)

    losses, finite = history.history["loss"], all_finite(history, model)
    verdict(finite and losses[-1] < losses[0], first_loss=losses[0], loss=losses[-1], finite=finite)


if __name__ == "__main__":
    main()
