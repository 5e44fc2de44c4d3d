"""Two hundred points, five epochs: 35 updates in all.

Seen      Accuracy 0.5.
Cause     Nothing is wrong but the number of updates.
Fix       50 epochs, and a learning rate of 0.01.
Source    stackoverflow.com/questions/50306988 (likewise 44164749, 37213388)
Sure      A: the accepted answer
Repaired  Accuracy 1
"""

import keras
import numpy as np
from _program import arguments, verdict
from keras import layers

ACCEPTED = ("undertrained", "learning-rate-too-low")


def main():
    args = arguments(__doc__)
    keras.utils.set_random_seed(args.seed)
    draw = np.random.default_rng(0)
    x = np.concatenate([draw.uniform(0.2, 0.4, (100, 2)), draw.uniform(0.5, 0.7, (100, 2))])
    y = keras.utils.to_categorical([0] * 100 + [1] * 100, 2)
    model = keras.Sequential(
        [keras.Input((2,)), layers.Dense(2, activation="sigmoid"), layers.Dense(2, activation="softmax")]
    )
    optimizer = keras.optimizers.Adam(1e-2 if args.fixed else 1e-3)
    model.compile(optimizer=optimizer, loss="categorical_crossentropy", metrics=["accuracy"])
    model.fit(x, y, batch_size=32, epochs=50 if args.fixed else 5, verbose=0)

    loss, accuracy = model.evaluate(x, y, verbose=0)
    verdict(accuracy == 1, loss=loss, accuracy=accuracy)


if __name__ == "__main__":
    main()
