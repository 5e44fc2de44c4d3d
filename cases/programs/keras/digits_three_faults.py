"""Digit images with raw pixels, sigmoid class scores and plain SGD at 1e-4: three faults in one program.

Seen      Accuracy between 0.1 and 0.2.
Cause     Pixels up to 255, a sigmoid in place of a softmax, a tiny learning rate. (On TensorFlow, Keras computes the
          loss from the scores before the sigmoid: two faults remain.)
Fix       Pixels in [0, 1], a softmax, Adam.
Source    stackoverflow.com/questions/55328966
Sure      A: the accepted answer
Repaired  Accuracy of 0.98 or more
"""

import keras
from _arrays import images, unit_range
from _program import arguments, verdict
from keras import layers

ACCEPTED = ("unscaled-inputs", "learning-rate-too-low", "bounded-output", "saturated-output")


def main():
    args = arguments(__doc__)
    keras.utils.set_random_seed(args.seed)
    x, y = images(512, size=28, noise=0.3)
    x = unit_range(x) * (1 if args.fixed else 255)
    model = keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Flatten(),
            layers.Dense(50, activation="relu"),
            layers.Dense(10, activation="softmax" if args.fixed else "sigmoid"),
        ]
    )
    optimizer = keras.optimizers.Adam(1e-3) if args.fixed else keras.optimizers.SGD(1e-4)
    model.compile(optimizer=optimizer, loss="categorical_crossentropy", metrics=["accuracy"])
    labels = keras.utils.to_categorical(y, 10)
    history = model.fit(x, labels, batch_size=32, epochs=19, verbose=0)

    loss, accuracy = model.evaluate(x, labels, verbose=0)
    verdict(accuracy >= 0.98, first_loss=history.history["loss"][0], loss=loss, accuracy=accuracy)


if __name__ == "__main__":
    main()
