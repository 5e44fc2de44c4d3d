"""A regression whose targets lie around 50.

Scary     The first loss is about 2500.
Healthy   It comes down at once, as soon as the output's bias has found the offset.
"""

import keras
import numpy as np
from _arrays import float32
from _program import arguments, verdict
from keras import layers

ACCEPTED = ()


def main():
    args = arguments(__doc__, pair=False)
    keras.utils.set_random_seed(args.seed)
    draw = np.random.default_rng(0)
    x = float32(draw.standard_normal((400, 5)))
    y = float32(x @ draw.standard_normal((5, 1)) + 50)
    model = keras.Sequential([keras.Input((5,)), layers.Dense(32, activation="relu"), layers.Dense(1)])
    model.compile(optimizer=keras.optimizers.Adam(1e-2), loss="mse")
    history = model.fit(x, y, batch_size=40, epochs=60, verbose=0)

    losses, variance = history.history["loss"], float(y.var())
    verdict(losses[-1] < variance, word="healthy", first_loss=losses[0], loss=losses[-1], variance=variance)


if __name__ == "__main__":
    main()
