"""XOR with a mean absolute error, sigmoids and small steps.

Seen      The loss stays near 0.5 and all outputs near 0.5.
Cause     The gradient of the absolute error has a constant size, the sigmoid's slope is at most 0.25, and the steps are
          too few and too small.
Fix       Mean squared error and Adam.
Source    stackoverflow.com/questions/31556268
Sure      A: the accepted answer
Repaired  Accuracy 1, and outputs that spread over more than 0.9
"""

import keras
import numpy as np
from _program import arguments, verdict
from keras import layers

ACCEPTED = ("learning-rate-too-low", "saturating-activations", "flat-loss", "undertrained")


def main():
    args = arguments(__doc__)
    keras.utils.set_random_seed(args.seed)
    x = np.array([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    y = np.array([[0.0], [1.0], [0.0], [1.0]])
    model = keras.Sequential(
        [
            keras.Input((2,)),
            layers.Dense(4, activation="sigmoid", kernel_initializer="lecun_normal"),
            layers.Dense(1, activation="sigmoid", kernel_initializer="lecun_normal"),
        ]
    )
    if args.fixed:
        model.compile(optimizer=keras.optimizers.Adam(0.05), loss="mse")
    else:
        optimizer = keras.optimizers.SGD(0.05, momentum=0.11, nesterov=True)
        model.compile(optimizer=optimizer, loss="mean_absolute_error")
    # All four rows in every batch; an epoch of 100 such batches instead of one spares the pause between epochs.
    history = model.fit(np.tile(x, (100, 1)), np.tile(y, (100, 1)), batch_size=4, shuffle=False, epochs=10, verbose=0)

    outputs = model.predict(x, verbose=0)
    accuracy, spread = float(((outputs > 0.5) == y).mean()), float(outputs.max() - outputs.min())
    verdict(accuracy == 1 and spread > 0.9, loss=history.history["loss"][-1], accuracy=accuracy, spread=spread)


if __name__ == "__main__":
    main()
