"""A network whose weights and biases all start at zero.

Seen      The loss stays at ln 4; only the output's bias moves.
Cause     A ReLU of 0 is 0, and a gradient through a weight of 0 is 0: no layer can begin.
Fix       Random weights, as by default.
Source    github.com/wagonhelm/NaNmnist/issues/2, github.com/davharris/mistnet/issues/87
Sure      B: advice in the threads. For a linear model a start at zero is fine
Repaired  Accuracy of 0.98 or more, and a movement of every kernel
"""

import keras
from _arrays import blobs
from _program import arguments, verdict
from keras import layers

ACCEPTED = ("zero-initialization",)


def main():
    args = arguments(__doc__)
    keras.utils.set_random_seed(args.seed)
    x, y = blobs(600, 20, 4, 1.5)
    initializer = "glorot_uniform" if args.fixed else "zeros"
    model = keras.Sequential(
        [
            keras.Input((20,)),
            layers.Dense(32, activation="relu", kernel_initializer=initializer),
            layers.Dense(32, activation="relu", kernel_initializer=initializer),
            layers.Dense(4, activation="softmax", kernel_initializer=initializer),
        ]
    )
    model.compile(optimizer="adam", loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    before = model.get_weights()
    model.fit(x, y, batch_size=64, epochs=20, verbose=0)

    loss, accuracy = model.evaluate(x, y, verbose=0)
    moved = min(float(abs(new - old).max()) for new, old in zip(model.get_weights()[::2], before[::2], strict=True))
    verdict(accuracy >= 0.98 and moved > 0, loss=loss, accuracy=accuracy, least_moved=moved)


if __name__ == "__main__":
    main()
