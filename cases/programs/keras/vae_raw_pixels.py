"""A variational autoencoder on pixels up to 255, whose log-variance has no bound.

Seen      The divergence term explodes; then NaN.
Cause     exp(log-variance) overflows on unscaled pixels. Every entry stays finite, the gradient's norm does not.
Fix       Pixels in [0, 1], log-variance clamped to [-10, 10].
Source    github.com/vanderschaarlab/synthcity/issues/331, github.com/AppliedDataSciencePartners/WorldModels/issues/9,
          github.com/NVlabs/NVAE/issues/27
Sure      B: several users agree
Repaired  A loss below 20
"""

import keras
import tensorflow as tf
from _arrays import images, unit_range
from _program import all_finite, arguments, verdict
from keras import layers, ops

ACCEPTED = ("invalid-operation",)


class Autoencoder(keras.Model):
    def __init__(self, *, clamped):
        super().__init__()
        self.clamped = clamped
        self.encoder = layers.Dense(128, activation="relu")
        self.mean, self.log_variance = layers.Dense(8), layers.Dense(8)
        self.decoder = keras.Sequential([layers.Dense(128, activation="relu"), layers.Dense(256)])
        self.draw = keras.random.SeedGenerator()
        self.loss_tracker = keras.metrics.Mean(name="loss")

    def call(self, x):
        hidden = self.encoder(x)
        mean, log_variance = self.mean(hidden), self.log_variance(hidden)
        if self.clamped:
            log_variance = ops.clip(log_variance, -10, 10)
        code = mean + keras.random.normal(ops.shape(mean), seed=self.draw) * ops.exp(0.5 * log_variance)
        return self.decoder(code), mean, log_variance

    def train_step(self, x):
        with tf.GradientTape() as tape:
            decoded, mean, log_variance = self(x, training=True)
            reconstruction = tf.reduce_mean(tf.reduce_sum(tf.square(decoded - x), axis=1))
            divergence = -0.5 * tf.reduce_sum(1 + log_variance - mean**2 - tf.exp(log_variance), axis=1)
            loss = reconstruction + tf.reduce_mean(divergence)
        grads = tape.gradient(loss, self.trainable_weights)
        self.optimizer.apply_gradients(zip(grads, self.trainable_weights, strict=True))
        self.loss_tracker.update_state(loss)
        return {"loss": self.loss_tracker.result()}


def main():
    args = arguments(__doc__)
    keras.utils.set_random_seed(args.seed)
    x = unit_range(images(256, noise=0.3)[0].reshape(256, 256)) * (1 if args.fixed else 255)
    model = Autoencoder(clamped=args.fixed)
    model.compile(optimizer=keras.optimizers.Adam(1e-3))
    history = model.fit(x, batch_size=64, epochs=20, verbose=0)

    losses, finite = history.history["loss"], all_finite(history, model)
    verdict(finite and losses[-1] < 20, first_loss=losses[0], loss=losses[-1], finite=finite)


if __name__ == "__main__":
    main()
