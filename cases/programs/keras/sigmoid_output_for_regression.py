"""A sigmoid output that has to fit a straight line up to 31.

Seen      The prediction is flat and never exceeds 1.
Cause     The range of the output, (0, 1), does not hold the targets.
Fix       A linear output unit.
Source    stackoverflow.com/questions/48221692
Sure      A: the accepted answer
Repaired  Mean squared error below 5 % of the targets' variance
"""

import keras
import numpy as np
from _program import arguments, verdict
from keras import layers

ACCEPTED = ("bounded-output",)


def main():
    args = arguments(__doc__)
    keras.utils.set_random_seed(args.seed)
    x = np.linspace(0, 10, 200)[:, None]
    y = 3 * x + 1
    model = keras.Sequential(
        [
            keras.Input((1,)),
            layers.Dense(5, activation="sigmoid"),
            layers.Dense(1, activation=None if args.fixed else "sigmoid"),
        ]
    )
    model.compile(optimizer=keras.optimizers.SGD(0.01), loss="mse")
    model.fit(x, y, batch_size=10, epochs=80, verbose=0)

    loss = model.evaluate(x, y, verbose=0)
    share = loss / float(y.var())
    verdict(share < 0.05, loss=loss, share_of_variance=share)


if __name__ == "__main__":
    main()
