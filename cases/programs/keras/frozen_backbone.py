"""A linear head on random convolutional features that are frozen on purpose.

Scary     The frozen parameters never change.
Healthy   The head learns: accuracy of 0.98 or more.
"""

import keras
from _arrays import images
from _program import arguments, verdict
from keras import layers

ACCEPTED = ()


def main():
    args = arguments(__doc__, pair=False)
    keras.utils.set_random_seed(args.seed)
    x, y = images(512, noise=0.3)
    backbone = keras.Sequential(
        [
            keras.Input((16, 16, 1)),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.AveragePooling2D(4),
            layers.Flatten(),
        ]
    )
    backbone.trainable = False
    model = keras.Sequential([backbone, layers.Dense(10, activation="softmax")])
    model.compile(optimizer=keras.optimizers.Adam(5e-3), loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    history = model.fit(x, y, batch_size=64, epochs=40, verbose=0)

    loss, accuracy = model.evaluate(x, y, verbose=0)
    verdict(accuracy >= 0.98, word="healthy", first_loss=history.history["loss"][0], loss=loss, accuracy=accuracy)


if __name__ == "__main__":
    main()
