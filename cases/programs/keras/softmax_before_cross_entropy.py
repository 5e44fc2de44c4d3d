"""A softmax layer before a cross-entropy that is told `from_logits=True` and applies one of its own.

Seen      The loss stays at a high constant, though the accuracy can be perfect.
Cause     The softmax of probabilities is bounded: with K classes the loss cannot fall below ln(e + K - 1) - 1. (On
          TensorFlow, Keras goes back to the scores before the softmax, and the fault is none.)
Fix       Without the softmax layer.
Source    github.com/ariecattan/SciCo/issues/2 (fixed), github.com/Lightning-Universe/lightning-bolts/issues/654,
          discuss.pytorch.org/t/cross-entropy-loss-is-not-decreasing/43814
Sure      A: fixed by the authors
Repaired  Loss below a tenth of that floor
"""

import math

import keras
from _arrays import blobs
from _program import arguments, verdict
from keras import layers

ACCEPTED = ("double-activation",)
BACKEND = "jax"


def main():
    args = arguments(__doc__)
    keras.utils.set_random_seed(args.seed)
    x, y = blobs(1000, 20, 4, 1.0)
    model = keras.Sequential(
        [
            keras.Input((20,)),
            layers.Dense(64, activation="relu"),
            layers.Dense(4, activation=None if args.fixed else "softmax"),
        ]
    )
    criterion = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=keras.optimizers.Adam(1e-3), loss=criterion, metrics=["accuracy"])
    model.fit(x, y, batch_size=64, epochs=95, verbose=0)

    loss, accuracy = model.evaluate(x, y, verbose=0)
    floor = math.log(math.e + 3) - 1
    verdict(loss < floor / 10, loss=loss, accuracy=accuracy, floor=floor)


if __name__ == "__main__":
    main()
