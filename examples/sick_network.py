"""One sick network in four frameworks: twelve layers of sigmoid in a row, from the same weights, on the same batches.

python sick_network.py torch|keras|tensorflow|optax      # Keras on the backend of KERAS_BACKEND

Whatever trains it, the gradient is gone before it reaches the first layers, and isograd says the same.
"""

import argparse
from itertools import pairwise

import numpy as np

SIZES = [20, *[24] * 12, 2]
RATE, BATCH = 0.1, 32


def problem(seed):
    """(inputs, labels, (kernel, bias) of each layer): Glorot & Bengio's uniform initialization."""
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(1024, SIZES[0])).astype("float32")
    y = (x[:, 0] > 0).astype("int64")
    limits = [np.sqrt(6 / (inputs + outputs)) for inputs, outputs in pairwise(SIZES)]
    shapes = zip(limits, pairwise(SIZES), strict=True)
    return x, y, [(draw.uniform(-a, a, size).astype("float32"), np.zeros(size[1], "float32")) for a, size in shapes]


def batches(x, y, steps):
    for step in range(steps):
        first = step * BATCH % len(x)
        yield x[first : first + BATCH], y[first : first + BATCH]


def in_torch(x, y, start, steps):
    import torch
    from torch import nn

    model = nn.Sequential()
    for number, (kernel, bias) in enumerate(start):
        layer = nn.Linear(*kernel.shape)
        layer.weight.data, layer.bias.data = torch.tensor(kernel.T.copy()), torch.tensor(bias)
        model.append(layer)
        if number < len(start) - 1:
            model.append(nn.Sigmoid())
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for inputs, labels in batches(x, y, steps):
        loss = nn.functional.cross_entropy(model(torch.tensor(inputs)), torch.tensor(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def keras_model(start):
    import keras

    hidden = [keras.layers.Dense(size, activation="sigmoid") for size in SIZES[1:-1]]
    model = keras.Sequential([keras.Input((SIZES[0],)), *hidden, keras.layers.Dense(SIZES[-1])])
    model.set_weights([value for pair in start for value in pair])
    return model


def in_keras(x, y, start, steps):
    import keras

    model = keras_model(start)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(RATE), loss)
    for inputs, labels in batches(x, y, steps):
        loss = model.train_on_batch(inputs, labels)
    return float(np.ravel(loss)[0])


def in_tensorflow(x, y, start, steps):
    import tensorflow as tf

    model, optimizer = keras_model(start), tf.keras.optimizers.SGD(RATE)
    for inputs, labels in batches(x, y, steps):
        with tf.GradientTape() as tape:
            scores = model(inputs, training=True)
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, scores))
        optimizer.apply_gradients(
            zip(tape.gradient(loss, model.trainable_variables), model.trainable_variables, strict=True)
        )
    return float(loss)


def in_optax(x, y, start, steps):
    import jax
    import jax.numpy as jnp
    import optax

    from isograd.frameworks.jax import monitor

    def loss_of(params, inputs, labels):
        for number in range(len(params)):
            layer = params[f"dense_{number}"]
            inputs = inputs @ layer["kernel"] + layer["bias"]
            inputs = jax.nn.sigmoid(inputs) if number < len(params) - 1 else inputs
        return optax.softmax_cross_entropy_with_integer_labels(inputs, labels).mean()

    @jax.jit
    def train_step(params, opt_state, inputs, labels):
        loss, gradients = jax.value_and_grad(loss_of)(params, inputs, labels)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    pairs = enumerate(start)
    params = {f"dense_{number}": {"kernel": jnp.asarray(k), "bias": jnp.asarray(b)} for number, (k, b) in pairs}
    optimizer = monitor(optax.sgd(RATE))
    opt_state = optimizer.init(params)
    for inputs, labels in batches(x, y, steps):
        params, opt_state, loss = train_step(params, opt_state, inputs, labels)
        opt_state = optimizer.read(opt_state, loss=loss)
    return float(loss)


TRAINED = {"torch": in_torch, "keras": in_keras, "tensorflow": in_tensorflow, "optax": in_optax}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("framework", choices=TRAINED)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    loss = TRAINED[args.framework](*problem(args.seed), args.steps)
    print(f"{args.framework}: loss {loss:.4f} after {args.steps} steps; {np.log(2):.4f} is chance")


if __name__ == "__main__":
    main()
