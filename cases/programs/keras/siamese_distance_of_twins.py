"""A Siamese network whose distance is the square root of a sum of squares.

Seen      NaN "suddenly in some iteration".
Cause     The derivative of the root at 0 is infinite, and two rows of the data are the same.
Fix       The sum is held above `keras.config.epsilon()`.
Source    github.com/adambielski/siamese-triplet/issues/18, github.com/tensorflow/tensorflow/issues/30199,
          github.com/huggingface/sentence-transformers/issues/4033
Sure      A: fixed by the author
Repaired  Everything finite
"""

import keras
from _arrays import blobs
from _program import all_finite, arguments, verdict
from keras import layers, ops

ACCEPTED = ("singular-derivative",)
UNREACHABLE = "The root of zero is taken in the program's own distance."


def distance(pair):
    left, right = pair
    return ops.sqrt(ops.sum(ops.square(left - right), axis=1, keepdims=True))


def safe_distance(pair):
    left, right = pair
    squared = ops.sum(ops.square(left - right), axis=1, keepdims=True)
    return ops.sqrt(ops.maximum(squared, keras.config.epsilon()))


def contrastive_loss(same, distances):
    contrast = same * ops.square(distances) + (1 - same) * ops.square(ops.maximum(2 - distances, 0))
    return ops.mean(contrast + 0.01 * distances)


def main():
    args = arguments(__doc__)
    keras.utils.set_random_seed(args.seed)
    x, y = blobs(1280, 10, 4, 1.0)
    left, right = x[::2], x[1::2]
    same = (y[::2] == y[1::2]).astype("float32")[:, None]
    right[300], same[300] = left[300], 1  # the twins
    embed = keras.Sequential([keras.Input((10,)), layers.Dense(32, activation="relu"), layers.Dense(8)])
    inputs = [keras.Input((10,)), keras.Input((10,))]
    outputs = layers.Lambda(safe_distance if args.fixed else distance)([embed(one) for one in inputs])
    model = keras.Model(inputs, outputs)
    model.compile(optimizer=keras.optimizers.Adam(1e-3), loss=contrastive_loss)
    history = model.fit([left, right], same, batch_size=64, epochs=10, verbose=0)

    losses, finite = history.history["loss"], all_finite(history, model)
    verdict(finite, first_loss=losses[0], loss=losses[-1], finite=finite)


if __name__ == "__main__":
    main()
