"""An autoencoder of eight sigmoid layers.

Seen      The same picture comes out for every input; the loss is the variance of the data.
Cause     The stack of sigmoids starves the encoder of gradient.
Fix       ReLU with He initialization, a linear bottleneck, a sigmoid on the output only.
Source    github.com/tensorflow/tensorflow/issues/48308, github.com/keras-team/keras/issues/1476
Sure      B: several users agree
Repaired  Mean squared error below 10 % of the variance, and outputs that differ by more than 0.05
"""

import keras
from _arrays import images, unit_range
from _program import arguments, verdict
from keras import layers

ACCEPTED = ("saturating-activations",)


def main():
    args = arguments(__doc__)
    keras.utils.set_random_seed(args.seed)
    x = unit_range(images(400, noise=0.1)[0].reshape(400, 256))
    activation, initializer = ("relu", "he_normal") if args.fixed else ("sigmoid", "glorot_uniform")

    inputs = hidden = keras.Input((256,))
    for width in (128, 64, 32):
        hidden = layers.Dense(width, activation=activation, kernel_initializer=initializer)(hidden)
    hidden = layers.Dense(8, activation=None if args.fixed else activation, name="code")(hidden)
    for width in (32, 64, 128):
        hidden = layers.Dense(width, activation=activation, kernel_initializer=initializer)(hidden)
    outputs = layers.Dense(256, activation="sigmoid")(hidden)
    model = keras.Model(inputs, outputs)
    model.compile(optimizer="adam", loss="mse")
    model.fit(x, x, batch_size=40, epochs=50, verbose=0)

    loss, variance = model.evaluate(x, x, verbose=0), float(x.var(0).mean())
    spread = float(model.predict(x, verbose=0).std(0).mean())
    verdict(loss < 0.1 * variance and spread > 0.05, loss=loss, variance=variance, spread=spread)


if __name__ == "__main__":
    main()
