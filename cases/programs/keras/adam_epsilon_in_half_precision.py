"""Adam with its usual epsilon on weights in half precision.

Seen      NaN after a few steps.
Cause     The square of a small gradient is 0 in float16, and 1e-7 under it is too small: the update is out of range.
Fix       An epsilon of 1e-4 (or weights and optimizer states in float32).
Source    github.com/keras-team/keras/issues/11860, github.com/pytorch/pytorch/issues/8860, 26218,
          github.com/NVIDIA/apex/issues/240
Sure      A: confirmed by maintainers
Repaired  Everything finite, and a loss below 0.05
"""

import keras
from _arrays import blobs
from _program import all_finite, arguments, verdict
from keras import layers

ACCEPTED = ("epsilon-too-small", "precision-underflow")


def main():
    args = arguments(__doc__)
    keras.utils.set_random_seed(args.seed)
    keras.config.set_dtype_policy("float16")
    x, y = blobs(600, 20, 4, 1.0)
    model = keras.Sequential(
        [keras.Input((20,)), layers.Dense(64, activation="relu"), layers.Dense(4, activation="softmax")]
    )
    optimizer = keras.optimizers.Adam(1e-3, epsilon=1e-4 if args.fixed else 1e-8)
    model.compile(optimizer=optimizer, loss="sparse_categorical_crossentropy")
    history = model.fit(x, y, batch_size=60, epochs=20, verbose=0)

    losses, finite = history.history["loss"], all_finite(history, model)
    verdict(finite and losses[-1] < 0.05, first_loss=losses[0], loss=losses[-1], finite=finite)


if __name__ == "__main__":
    main()
