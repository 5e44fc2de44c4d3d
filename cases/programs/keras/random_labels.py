"""A classifier on labels that carry no signal.

Scary     The loss stays at ln 2 for ever.
Healthy   Nothing is broken that could be repaired: there is nothing to learn (stackoverflow.com/questions/39217567).
"""

import math

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
    x, y = float32(draw.standard_normal((20000, 10))), draw.integers(0, 2, 20000)
    model = keras.Sequential(
        [keras.Input((10,)), layers.Dense(8, activation="relu"), layers.Dense(1, activation="sigmoid")]
    )
    model.compile(optimizer="adam", loss="binary_crossentropy")
    model.fit(x, y, batch_size=50, epochs=2, verbose=0)

    loss = model.evaluate(x, y, batch_size=1000, verbose=0)
    verdict(abs(loss - math.log(2)) < 0.02, word="healthy", loss=loss)


if __name__ == "__main__":
    main()
