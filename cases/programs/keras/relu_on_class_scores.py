"""A ReLU on the class scores, which the loss then normalizes to sum to one.

Seen      A small convolutional network ends far below the accuracy of its twin in another framework.
Cause     The ReLU sets negative scores to zero. Rows whose scores are all zero receive no gradient.
Fix       A softmax on the last layer.
Source    stackoverflow.com/questions/47352366
Sure      A: the accepted answer
Repaired  Accuracy of 0.98 or more, and no row whose scores are all zero
"""

import keras
from _arrays import images
from _program import arguments, verdict
from keras import layers

ACCEPTED = ("relu-output", "dead-units")


def main():
    args = arguments(__doc__)
    keras.utils.set_random_seed(args.seed)
    x, y = images()
    bias = keras.initializers.Constant(0.1)
    model = keras.Sequential(
        [
            keras.Input((16, 16, 1)),
            layers.Conv2D(16, 5, padding="same", activation="relu", bias_initializer=bias),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(64, activation="relu", bias_initializer=bias),
            layers.Dense(10, activation="softmax" if args.fixed else "relu", bias_initializer=bias),
        ]
    )
    model.compile(optimizer="adam", loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(x, y, batch_size=64, epochs=25, verbose=0)

    loss, accuracy = model.evaluate(x, y, verbose=0)
    dead_rows = float((model.predict(x, verbose=0) == 0).all(1).mean())
    verdict(accuracy >= 0.98 and dead_rows == 0, loss=loss, accuracy=accuracy, dead_rows=dead_rows)


if __name__ == "__main__":
    main()
