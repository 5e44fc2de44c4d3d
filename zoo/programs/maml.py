"""Model-agnostic meta-learning of sine waves: one inner gradient step, differentiated through, functional calls."""

import argparse
import math

import torch
from torch import nn
from torch.func import functional_call


def tasks(count, shots=10):
    amplitude, phase = 0.5 + 2 * torch.rand(count, 1), math.pi * torch.rand(count, 1)
    x = 10 * torch.rand(count, 2 * shots) - 5
    y = amplitude * torch.sin(x + phase)
    return x[:, :shots, None], y[:, :shots, None], x[:, shots:, None], y[:, shots:, None]


def adapt(model, x, y, rate=0.02, create_graph=True):
    parameters = dict(model.named_parameters())
    loss = nn.functional.mse_loss(functional_call(model, parameters, (x,)), y)
    gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=create_graph)
    return {name: p - rate * g for (name, p), g in zip(parameters.items(), gradients, strict=True)}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for iteration in range(400):
        loss = 0.0
        for x, y, x_query, y_query in zip(*tasks(4), strict=True):
            adapted = adapt(model, x, y)
            loss = loss + nn.functional.mse_loss(functional_call(model, adapted, (x_query,)), y_query) / 4
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if iteration % 80 == 0:
            print(f"iteration {iteration}  loss {loss.item():.3f}")
    before = after = 0.0
    for x, y, x_query, y_query in zip(*tasks(100), strict=True):
        adapted = adapt(model, x, y, create_graph=False)
        with torch.no_grad():
            before += nn.functional.mse_loss(model(x_query), y_query).item()
            after += nn.functional.mse_loss(functional_call(model, adapted, (x_query,)), y_query).item()
    print("error after one step, relative to before:", after / before)


if __name__ == "__main__":
    main()
