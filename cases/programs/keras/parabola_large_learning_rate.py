"""y = 5 x^2 with cubed noise, and plain SGD at 0.1.

Seen      NaN, or a flat line.
Cause     The step overshoots: the loss becomes NaN, or every ReLU dies.
Fix       A learning rate of 0.0001.
Source    stackoverflow.com/questions/48934338
Sure      A: the accepted answer
Repaired  Everything finite, and an error below 0.4 of the variance
"""

import keras
import numpy as np
from _program import all_finite, arguments, verdict
from keras import layers

ACCEPTED = ("learning-rate-too-high",)


def main():
    args = arguments(__doc__)
    keras.utils.set_random_seed(args.seed)
    x = np.arange(0, 5, 0.1)[:, None]
    y = 5 * x**2 + np.random.default_rng(0).standard_normal((50, 1)) ** 3
    model = keras.Sequential(
        [
            keras.Input((1,)),
            layers.Dense(50, activation="relu"),
            layers.Dense(30, activation="relu", kernel_initializer="random_uniform"),
            layers.Dense(1),
        ]
    )
    model.compile(optimizer=keras.optimizers.SGD(0.0001 if args.fixed else 0.1), loss="mse")
    history = model.fit(x, y, batch_size=5, epochs=100, verbose=0)

    share = model.evaluate(x, y, verbose=0) / float(y.var())
    finite = all_finite(history, model)
    verdict(finite and share < 0.4, share_of_variance=share, finite=finite)


if __name__ == "__main__":
    main()
