"""A softmax over the single output unit of a binary classifier.

Seen      Rows of ones against rows of zeros, and the accuracy stays at 0.5. Other initializations, activations and
          batch normalization change nothing.
Cause     The softmax of one number is 1 and its derivative 0: no gradient reaches the network. (On TensorFlow, Keras
          computes the loss from the score before the softmax: the network learns, and still predicts 1 for all.)
Fix       A sigmoid on the output.
Source    stackoverflow.com/questions/31880720 (the same in 42800203, 45337371, 45442843, 34311586)
Sure      A: the accepted answer
Repaired  Accuracy of 0.99 or more, and a first layer that moves
"""

import keras
import numpy as np
from _program import arguments, verdict
from keras import layers

ACCEPTED = ("softmax-over-one-unit", "bounded-output")
BACKEND = "jax"


def main():
    args = arguments(__doc__)
    keras.utils.set_random_seed(args.seed)
    x = np.concatenate([np.ones((500, 128)), np.zeros((500, 128))])
    y = np.concatenate([np.ones((500, 1)), np.zeros((500, 1))])
    model = keras.Sequential(
        [
            keras.Input((128,)),
            layers.Dense(50, activation="relu"),
            layers.Dropout(0.2),
            layers.Dense(50, activation="relu"),
            layers.Dropout(0.2),
            layers.Dense(1, activation="sigmoid" if args.fixed else "softmax"),
        ]
    )
    model.compile(optimizer=keras.optimizers.RMSprop(1e-3), loss="binary_crossentropy", metrics=["accuracy"])
    before = model.get_weights()[0]
    model.fit(x, y, batch_size=64, epochs=13, verbose=0)

    loss, accuracy = model.evaluate(x, y, verbose=0)
    moved = float(abs(model.get_weights()[0] - before).max())
    verdict(accuracy >= 0.99 and moved > 0, loss=loss, accuracy=accuracy, moved=moved)


if __name__ == "__main__":
    main()
