"""A multilayer perceptron on scikit-learn's handwritten digits in plain JAX and optax."""

import argparse
import itertools

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

from isograd.frameworks.jax import monitor


def digits():
    images, labels = load_digits(return_X_y=True)
    return jnp.asarray((images - images.mean()) / images.std(), jnp.float32), jnp.asarray(labels)


def network(key, sizes):
    layers = []
    for inputs, outputs in itertools.pairwise(sizes):
        key, draw = jax.random.split(key)
        kernel = jax.random.normal(draw, (inputs, outputs)) * jnp.sqrt(2 / inputs)
        layers.append({"kernel": kernel, "bias": jnp.zeros(outputs)})
    return layers


def logits(params, x):
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return x @ params[-1]["kernel"] + params[-1]["bias"]


def loss_of(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y).mean()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    x, y = digits()
    key = jax.random.key(args.seed)
    params = network(key, [x.shape[1], 128, 128, 10])
    optimizer = monitor(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)))
    opt_state = optimizer.init(params)

    @jax.jit
    def train_step(params, opt_state, batch):
        loss, gradients = jax.value_and_grad(loss_of)(params, x[batch], y[batch])
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    for step in range(args.steps):
        batch = jax.random.randint(jax.random.fold_in(key, step), (64,), 0, len(x))
        params, opt_state, loss = train_step(params, opt_state, batch)
        opt_state = optimizer.read(opt_state, loss=loss)
        if step % 20 == 0 or step == args.steps - 1:
            print(f"step {step:5d}  loss {loss:.4f}")


if __name__ == "__main__":
    main()
