"""A tanh recurrent network that has to recall the first of 100 symbols.

Seen      The loss stays at ln 4.
Cause     The recurrent matrix is small, and the gradient with respect to the first hidden state underflows to 0.
Fix       An orthogonal recurrent matrix.
Source    github.com/batzner/indrnn/issues/9, github.com/chentuochao/Sound_Bubble/issues/4
Sure      C: cause and fix are a reading of the threads
Repaired  Accuracy of 0.7 or more
"""

import keras
import numpy as np
from _program import arguments, verdict
from keras import layers

ACCEPTED = ("recurrent-vanishing",)
LENGTH, CLASSES = 100, 4


def main():
    args = arguments(__doc__)
    keras.utils.set_random_seed(args.seed)
    draw = np.random.default_rng(0)
    y = draw.integers(0, CLASSES, 512)
    symbols = draw.integers(CLASSES, 2 * CLASSES, (512, LENGTH))
    symbols[:, 0] = y  # the label in front, and symbols without meaning behind it
    x = keras.utils.to_categorical(symbols, 2 * CLASSES)
    model = keras.Sequential(
        [
            keras.Input((LENGTH, 2 * CLASSES)),
            layers.SimpleRNN(
                64,
                kernel_initializer=keras.initializers.RandomNormal(stddev=0.1),
                recurrent_initializer="orthogonal" if args.fixed else "random_normal",
            ),
            layers.Dense(CLASSES, activation="softmax"),
        ]
    )
    model.compile(
        optimizer=keras.optimizers.Adam(1e-3, global_clipnorm=1.0),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    model.fit(x, y, batch_size=64, epochs=30, verbose=0)

    loss, accuracy = model.evaluate(x, y, verbose=0)
    verdict(accuracy >= 0.7, loss=loss, accuracy=accuracy)


if __name__ == "__main__":
    main()
