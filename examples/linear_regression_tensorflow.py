"""A linear model in TensorFlow, gradient descent written out: a tape, and an assignment to each variable."""

import argparse

import numpy as np
import tensorflow as tf

from isograd.frameworks.tensorflow import step as tell

RATE = 0.1


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    draw = np.random.default_rng(args.seed)
    x = tf.constant(draw.normal(size=(200, 1)), tf.float32)
    y = 3 * x + 1 + tf.constant(0.1 * draw.normal(size=(200, 1)), tf.float32)
    slope, intercept = tf.Variable([[0.0]], name="slope"), tf.Variable([0.0], name="intercept")

    for number in range(args.steps):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((x @ slope + intercept - y) ** 2)
        gradients = tape.gradient(loss, [slope, intercept])
        tell(loss, gradients, [slope, intercept], learning_rate=RATE)  # does nothing where nobody watches
        slope.assign_sub(RATE * gradients[0])
        intercept.assign_sub(RATE * gradients[1])
        if number % 20 == 0 or number == args.steps - 1:
            print(f"step {number:5d}  loss {float(loss):.4f}")
    print(f"y = {float(slope[0, 0]):.3f} x + {float(intercept[0]):.3f}")


if __name__ == "__main__":
    main()
