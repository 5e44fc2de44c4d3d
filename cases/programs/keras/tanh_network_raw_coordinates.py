"""A tanh network on inputs of the order of 500.

Seen      It always predicts the same class: loss 0.693, accuracy 0.5.
Cause     In the first layer nearly all tanh are saturated, and its gradient is 0.
Fix       Standardized inputs.
Source    github.com/keras-team/keras/issues/2975, github.com/keras-team/keras/issues/2711
Sure      B: several users agree
Repaired  Accuracy of 0.98 or more, and fewer than 5 % of the first layer saturated at the start
"""

import keras
from _arrays import moons, standardized
from _program import arguments, verdict
from keras import layers, ops

ACCEPTED = ("unscaled-inputs", "saturating-activations")


def main():
    args = arguments(__doc__)
    keras.utils.set_random_seed(args.seed)
    x, y = moons()
    x = standardized(x) if args.fixed else x * 100 + 500
    model = keras.Sequential(
        [
            keras.Input((2,)),
            layers.Dense(64, activation="tanh"),
            layers.Dense(64, activation="tanh"),
            layers.Dense(2, activation="softmax"),
        ]
    )
    model.compile(optimizer=keras.optimizers.SGD(0.1), loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    saturated = float((abs(ops.convert_to_numpy(model.layers[0](x))) > 0.99).mean())
    model.fit(x, y, batch_size=16, epochs=60, verbose=0)

    loss, accuracy = model.evaluate(x, y, verbose=0)
    verdict(accuracy >= 0.98 and saturated < 0.05, loss=loss, accuracy=accuracy, saturated=saturated)


if __name__ == "__main__":
    main()
