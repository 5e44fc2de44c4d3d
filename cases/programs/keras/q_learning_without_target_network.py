"""Q-learning on recorded transitions that bootstraps from the network which it trains.

Seen      The temporal-difference error grows exponentially.
Cause     A moving target, a maximum over actions, and a discount near 1.
Fix       A target network, the Huber loss, clipped gradients.
Source    github.com/danijar/dreamer/issues/20, github.com/facebookresearch/ReAgent/issues/189,
          github.com/keras-rl/keras-rl/issues/28
Sure      A: the author's answer
Repaired  A loss below 1, and values that stay of the size of the rewards
"""

import keras
import numpy as np
import tensorflow as tf
from _arrays import float32
from _program import arguments, verdict
from keras import layers

ACCEPTED = ("bootstrapped-target", "learning-rate-too-high")
UNREACHABLE = "Which network gives the targets stands in the program's source."


class QLearning(keras.Model):
    def __init__(self, network, target, criterion):
        super().__init__()
        self.network, self.target, self.criterion = network, target, criterion
        self.loss_tracker = keras.metrics.Mean(name="loss")

    def train_step(self, transitions):
        states, actions, rewards, next_states = transitions[0]
        targets = rewards[:, 0] + 0.99 * tf.reduce_max(self.target(next_states), axis=1)
        with tf.GradientTape() as tape:
            values = tf.gather(self.network(states, training=True), actions[:, 0], axis=1, batch_dims=1)
            loss = self.criterion(tf.stop_gradient(targets), values)
        grads = tape.gradient(loss, self.network.trainable_variables)
        self.optimizer.apply_gradients(zip(grads, self.network.trainable_variables, strict=True))
        self.loss_tracker.update_state(loss)
        return {"loss": self.loss_tracker.result()}


class Follow(keras.callbacks.Callback):
    """The target network follows every 30 epochs."""

    def on_epoch_end(self, epoch, logs=None):
        if epoch % 30 == 29:
            self.model.target.set_weights(self.model.network.get_weights())


def main():
    args = arguments(__doc__)
    keras.utils.set_random_seed(args.seed)
    draw = np.random.default_rng(0)
    states, next_states = float32(3 * draw.standard_normal((2, 500, 6)))
    rewards, actions = float32(draw.standard_normal((500, 1))), draw.integers(0, 4, (500, 1))
    network = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(64, activation="relu"),
            layers.Dense(64, activation="relu"),
            layers.Dense(4),
        ]
    )
    target = network
    if args.fixed:
        target = keras.models.clone_model(network)
        target.set_weights(network.get_weights())
    model = QLearning(network, target, keras.losses.Huber() if args.fixed else keras.losses.MeanSquaredError())
    model.compile(optimizer=keras.optimizers.Adam(5e-3, global_clipnorm=1.0 if args.fixed else None))
    history = model.fit(
        (states, actions, rewards, next_states), batch_size=32, epochs=94, verbose=0,
        callbacks=[Follow()] if args.fixed else [],
    )  # fmt: skip

    losses, value = history.history["loss"], float(network.predict(states, verbose=0).max(1).mean())
    # Rewards of about 1 over 1 - 0.99
    verdict(losses[-1] < 1 and abs(value) < 100, first_loss=losses[0], loss=losses[-1], value=value)


if __name__ == "__main__":
    main()
