"""A convolutional network on pixels of 0 to 255, with He initialization and Adam: it looks bad and is not.

Seen      Low accuracy after five epochs.
Cause     The first loss is in the hundreds in place of 2.3, but training recovers from it; the run was merely short.
          (So on TensorFlow, where Keras computes the loss from the scores before the softmax. On JAX the softmax's
          zeros are clipped, and their gradient with them: there the network does not learn.)
Fix       More epochs; pixels in [0, 1] help.
Source    stackoverflow.com/questions/48594888
Sure      A: the accepted answer
Repaired  Accuracy of 0.98 or more. So does the unscaled program: a hint is welcome, an alarm is wrong
"""

import keras
from _arrays import images, unit_range
from _program import arguments, verdict
from keras import layers

ACCEPTED = ("unscaled-inputs",)
HARMLESS = True


def main():
    args = arguments(__doc__)
    keras.utils.set_random_seed(args.seed)
    x, y = images(512, channels=3, noise=0.3)
    x = unit_range(x) * (1 if args.fixed else 255)
    model = keras.Sequential(
        [
            keras.Input((16, 16, 3)),
            layers.Conv2D(16, 3, activation="relu", kernel_initializer="he_normal"),
            layers.MaxPooling2D(),
            layers.Conv2D(32, 3, activation="relu", kernel_initializer="he_normal"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(64, activation="relu", kernel_initializer="he_normal"),
            layers.Dropout(0.3),
            layers.Dense(10, activation="softmax", kernel_initializer="he_normal"),
        ]
    )
    model.compile(optimizer="adam", loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    history = model.fit(x, y, batch_size=64, epochs=31, verbose=0)

    loss, accuracy = model.evaluate(x, y, verbose=0)
    verdict(accuracy >= 0.98, first_loss=history.history["loss"][0], loss=loss, accuracy=accuracy)


if __name__ == "__main__":
    main()
