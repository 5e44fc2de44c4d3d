"""Gradient clipping in TensorFlow and in PyTorch, side by side: by value, by norm, by the norm of each tensor, or not.

The same small regression from the same weights; its first gradients are far longer than the limit. Both columns are
equal: the functions do the same in both.
"""

import argparse

import numpy as np
import tensorflow as tf
import torch

LIMIT = 1.0


def problem(seed):
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(256, 8)).astype("float32") * 3
    y = (x @ draw.normal(size=(8, 1)) + 10).astype("float32")
    return x, y, [draw.normal(size=shape).astype("float32") for shape in ((8, 16), (16,), (16, 1), (1,))]


def in_tensorflow(x, y, start, clip, steps, rate):
    w1, b1, w2, b2 = weights = [tf.Variable(value) for value in start]
    losses = []
    for _ in range(steps):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((tf.tanh(x @ w1 + b1) @ w2 + b2 - y) ** 2)
        gradients = tape.gradient(loss, weights)
        if clip == "value":
            gradients = [tf.clip_by_value(gradient, -LIMIT, LIMIT) for gradient in gradients]
        elif clip == "norm":
            gradients, _ = tf.clip_by_global_norm(gradients, LIMIT)
        elif clip == "tensor-norm":
            gradients = [tf.clip_by_norm(gradient, LIMIT) for gradient in gradients]
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.assign_sub(rate * gradient)
        losses.append(float(loss))
    return losses


def in_pytorch(x, y, start, clip, steps, rate):
    w1, b1, w2, b2 = weights = [torch.nn.Parameter(torch.tensor(value)) for value in start]
    optimizer = torch.optim.SGD(weights, lr=rate)
    x, y = torch.tensor(x), torch.tensor(y)
    losses = []
    for _ in range(steps):
        loss = ((torch.tanh(x @ w1 + b1) @ w2 + b2 - y) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        if clip == "value":
            torch.nn.utils.clip_grad_value_(weights, LIMIT)
        elif clip == "norm":
            torch.nn.utils.clip_grad_norm_(weights, LIMIT)
        elif clip == "tensor-norm":
            for weight in weights:
                torch.nn.utils.clip_grad_norm_([weight], LIMIT)
        optimizer.step()
        losses.append(loss.item())
    return losses


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=0.05)
    args = parser.parse_args()

    x, y, start = problem(args.seed)
    for clip in ("none", "value", "norm", "tensor-norm"):
        found = [run(x, y, start, clip, args.steps, args.rate) for run in (in_tensorflow, in_pytorch)]
        for step in range(0, args.steps, max(1, args.steps // 5)):
            print(f"{clip:11s}  step {step:3d}  TensorFlow {found[0][step]:12.5f}  PyTorch {found[1][step]:12.5f}")


if __name__ == "__main__":
    main()
