"""Eight hidden layers of sigmoid.

Seen      The loss stays at ln 10, and the first layer hardly moves.
Cause     A sigmoid's slope is at most 0.25: every layer takes its share of the gradient.
Fix       ReLU with He initialization (batch normalization or shortcuts help, too).
Source    stackoverflow.com/questions/46270122, github.com/microsoft/LoRA/issues/167
Sure      B: several users agree
Repaired  Accuracy of 0.95 or more, and a first layer that moves by over 1 % of what the last one does
"""

import keras
import numpy as np
from _arrays import blobs
from _program import arguments, verdict
from keras import layers

ACCEPTED = ("saturating-activations",)


def main():
    args = arguments(__doc__)
    keras.utils.set_random_seed(args.seed)
    x, y = blobs()
    activation, initializer = ("relu", "he_normal") if args.fixed else ("sigmoid", "glorot_uniform")
    model = keras.Sequential([keras.Input((20,))])
    for _ in range(8):
        model.add(layers.Dense(32, activation=activation, kernel_initializer=initializer))
    model.add(layers.Dense(10, activation="softmax"))
    model.compile(optimizer=keras.optimizers.SGD(0.05), loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    before = model.get_weights()
    model.fit(x, y, batch_size=64, epochs=60, verbose=0)

    loss, accuracy = model.evaluate(x, y, verbose=0)
    moved = [float(np.linalg.norm(new - old)) for new, old in zip(model.get_weights(), before, strict=True)]
    ratio = moved[0] / moved[-2]
    verdict(accuracy >= 0.95 and ratio > 1e-2, loss=loss, accuracy=accuracy, first_over_last_move=ratio)


if __name__ == "__main__":
    main()
