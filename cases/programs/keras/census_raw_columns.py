"""Census rows whose columns span five orders of magnitude.

Seen      The accuracy is frozen at the share of the larger class, 0.76.
Cause     Columns of 1e5 beside columns of 10, none of them scaled.
Fix       Standardized columns, and Adam with 0.01.
Source    stackoverflow.com/questions/47724077
Sure      A: the accepted answer
Repaired  Accuracy above the share of the larger class by 0.15 or more
"""

import keras
import numpy as np
from _arrays import standardized
from _program import arguments, verdict
from keras import layers

ACCEPTED = ("unscaled-inputs",)


def main():
    args = arguments(__doc__)
    keras.utils.set_random_seed(args.seed)
    hidden = np.random.default_rng(0).standard_normal((1000, 6))
    y = (hidden[:, 0] + hidden[:, 1] > 1.0).astype(int)
    # Age, years of schooling, sampling weight, capital gain, capital loss, hours a week.
    x = hidden * [14.0, 3.0, 1e5, 7000.0, 400.0, 12.0] + [38.0, 10.0, 1.9e5, 1000.0, 87.0, 40.0]
    if args.fixed:
        x = standardized(x)
    model = keras.Sequential(
        [keras.Input((6,)), layers.Dense(21, activation="relu"), layers.Dense(2, activation="softmax")]
    )
    optimizer = keras.optimizers.Adam(1e-2 if args.fixed else 1e-3)
    model.compile(optimizer=optimizer, loss="categorical_crossentropy", metrics=["accuracy"])
    labels = keras.utils.to_categorical(y, 2)
    model.fit(x, labels, batch_size=100, epochs=50, verbose=0)

    loss, accuracy = model.evaluate(x, labels, verbose=0)
    majority = float(max(y.mean(), 1 - y.mean()))
    verdict(accuracy > majority + 0.15, loss=loss, accuracy=accuracy, majority=majority)


if __name__ == "__main__":
    main()
