"""Cosine annealing with warm restarts.

Scary     The loss rises by a third after a restart.
Healthy   It falls again each time: accuracy of 0.97 or more.
"""

import keras
from _arrays import blobs
from _program import arguments, verdict
from keras import layers

ACCEPTED = ()


def main():
    args = arguments(__doc__, pair=False)
    keras.utils.set_random_seed(args.seed)
    x, y = blobs(1000, 20, 10, 0.7)
    model = keras.Sequential(
        [keras.Input((20,)), layers.Dense(64, activation="relu"), layers.Dense(10, activation="softmax")]
    )
    schedule = keras.optimizers.schedules.CosineDecayRestarts(0.2, first_decay_steps=100, t_mul=1.0)
    optimizer = keras.optimizers.SGD(schedule, momentum=0.9)
    model.compile(optimizer=optimizer, loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    history = model.fit(x, y, batch_size=50, epochs=30, verbose=0)

    losses = history.history["loss"]
    accuracy = model.evaluate(x, y, verbose=0)[1]
    verdict(
        accuracy >= 0.97, word="healthy",
        before_restart=losses[4], after_restart=losses[5], loss=losses[-1], accuracy=accuracy,
    )  # fmt: skip


if __name__ == "__main__":
    main()
