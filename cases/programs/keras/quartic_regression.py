"""y = x^4 on [-100, 100], neither of them scaled.

Seen      A loss of 1e15 and a flat prediction; x^3 seems to work.
Cause     Inputs of 100 saturate the first sigmoid, and targets of 1e8 need 1e8 steps of Adam's size.
Fix       Both standardized (and a ReLU in the first layer).
Source    stackoverflow.com/questions/52800582
Sure      A: the accepted answer
Repaired  Mean squared error below 1 % of the variance
"""

import keras
import numpy as np
from _arrays import standardized
from _program import arguments, verdict
from keras import layers

ACCEPTED = ("unscaled-targets", "unscaled-inputs")


def main():
    args = arguments(__doc__)
    keras.utils.set_random_seed(args.seed)
    x = np.arange(-100, 100, 0.5)[:, None]
    y = x**4
    if args.fixed:
        x, y = standardized(x), standardized(y)
    model = keras.Sequential(
        [
            keras.Input((1,)),
            layers.Dense(50, activation="relu" if args.fixed else "sigmoid"),
            layers.Dense(50, activation="elu"),
            layers.Dense(1),
        ]
    )
    model.compile(optimizer="adam", loss="mse")
    model.fit(x, y, batch_size=40, epochs=100, verbose=0)

    loss = model.evaluate(x, y, verbose=0)
    share = loss / float(y.var())
    verdict(share < 0.01, loss=loss, share_of_variance=share)


if __name__ == "__main__":
    main()
