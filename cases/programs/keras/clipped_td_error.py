"""A temporal-difference error that is clipped before it is squared.

Seen      A deep Q-network learns slowly or not at all as long as its errors are large.
Cause     Outside its range the derivative of the clipping is zero: the loss is exactly 1, and its gradient exactly 0.
Fix       The Huber loss of the error.
Source    github.com/devsisters/DQN-tensorflow/issues/16
Sure      A: confirmed by the owner
Repaired  Root mean squared error below 1, and a first layer that moves
"""

import keras
import numpy as np
from _arrays import float32
from _program import arguments, verdict
from keras import layers, ops

ACCEPTED = ("flat-loss", "unscaled-targets")
UNREACHABLE = "The error is cut in the program's own expression; another loss has to stand there."


def clipped_squared_error(y_true, y_pred):
    return ops.mean(ops.square(ops.clip(y_pred - y_true, -1, 1)))


def main():
    args = arguments(__doc__)
    keras.utils.set_random_seed(args.seed)
    x = float32(np.random.default_rng(0).standard_normal((512, 4)))
    y = 40 + 10 * x[:, :1]
    model = keras.Sequential([keras.Input((4,)), layers.Dense(64, activation="relu"), layers.Dense(1)])
    criterion = keras.losses.Huber() if args.fixed else clipped_squared_error
    model.compile(optimizer=keras.optimizers.Adam(3e-3), loss=criterion)
    before = model.get_weights()[0]
    history = model.fit(x, y, batch_size=64, epochs=75, verbose=0)

    rmse = float(np.sqrt(((model.predict(x, verbose=0) - y) ** 2).mean()))
    moved = float(abs(model.get_weights()[0] - before).max())
    losses = history.history["loss"]
    verdict(rmse < 1 and moved > 0, first_loss=losses[0], loss=losses[-1], rmse=rmse, moved=moved)


if __name__ == "__main__":
    main()
