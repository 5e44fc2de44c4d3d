"""A linear regression on budgets of up to 300.

Seen      The loss is NaN in every epoch.
Cause     The curvature grows with the square of the inputs, to 3e4: the step is beyond 2 over the largest eigenvalue.
Fix       Standardized inputs (without them only a learning rate of 1e-7 worked).
Source    stats.stackexchange.com/questions/284189
Sure      A: the accepted answer
Repaired  Everything finite, and a mean squared error below a tenth of the variance
"""

import keras
import numpy as np
from _arrays import standardized
from _program import all_finite, arguments, verdict
from keras import layers

ACCEPTED = ("unscaled-inputs", "learning-rate-too-high")


def main():
    args = arguments(__doc__)
    keras.utils.set_random_seed(args.seed)
    draw = np.random.default_rng(0)
    x = draw.random((100, 1)) * 300
    y = 0.05 * x + 7 + draw.standard_normal((100, 1))
    if args.fixed:
        x = standardized(x)
    model = keras.Sequential([keras.Input((1,)), layers.Dense(1)])
    model.compile(optimizer=keras.optimizers.SGD(0.01), loss="mse")
    history = model.fit(x, y, batch_size=1, epochs=4, verbose=0)

    share = model.evaluate(x, y, verbose=0) / float(y.var())
    finite = all_finite(history, model)
    verdict(finite and share < 0.1, share_of_variance=share, finite=finite)


if __name__ == "__main__":
    main()
