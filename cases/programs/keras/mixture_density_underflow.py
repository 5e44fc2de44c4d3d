"""A mixture density network whose likelihood is computed before its logarithm.

Seen      The loss goes to inf, then to NaN.
Cause     exp(-z^2 / 2) underflows to 0 far from every component, and the logarithm of 0 is -inf.
Fix       `logsumexp` of the logarithms.
Source    github.com/keras-team/keras/issues/1061
Sure      B: several users agree
Repaired  Everything finite, and a negative log-likelihood below 3
"""

import keras
import numpy as np
from _arrays import float32
from _program import all_finite, arguments, verdict
from keras import layers, ops

ACCEPTED = ("invalid-operation",)
UNREACHABLE = "The logarithm of zero is taken in the program's own loss."
COMPONENTS = 5


def stable_loss(t, outputs):
    shares, means, log_scales = ops.split(outputs, 3, axis=1)
    z = (t - means) * ops.exp(-log_scales)
    return -ops.mean(ops.logsumexp(ops.log_softmax(shares, 1) - log_scales - 0.5 * z**2 - 0.919, axis=1))


def plain_loss(t, outputs):
    shares, means, log_scales = ops.split(outputs, 3, axis=1)
    scales = ops.exp(log_scales)
    densities = ops.exp(-0.5 * ((t - means) / scales) ** 2) / (scales * 2.5066)
    return -ops.mean(ops.log(ops.sum(ops.softmax(shares, 1) * densities, axis=1)))


def main():
    args = arguments(__doc__)
    keras.utils.set_random_seed(args.seed)
    t = float32(np.random.default_rng(0).uniform(-30, 30, (512, 1)))
    x = t / 10 + 0.3 * np.sin(t)
    model = keras.Sequential([keras.Input((1,)), layers.Dense(32, activation="tanh"), layers.Dense(3 * COMPONENTS)])
    model.compile(optimizer=keras.optimizers.Adam(1e-2), loss=stable_loss if args.fixed else plain_loss)
    history = model.fit(x, t, batch_size=64, epochs=40, verbose=0)

    losses, finite = history.history["loss"], all_finite(history, model)
    verdict(finite and losses[-1] < 3, first_loss=losses[0], loss=losses[-1], finite=finite)


if __name__ == "__main__":
    main()
