"""A physics-informed network solves u'' = -u with u(0) = 0, u'(0) = 1: derivatives by double back-propagation."""

import argparse
import math

import torch
from torch import nn


def derivative(y, x):
    return torch.autograd.grad(y.sum(), x, create_graph=True)[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.998)
    start = torch.zeros(1, 1, requires_grad=True)
    for step in range(1000):
        x = (math.pi * torch.rand(64, 1)).requires_grad_()
        u = model(x)
        residual = derivative(derivative(u, x), x) + u
        u0 = model(start)
        loss = residual.square().mean() + u0.square().sum() + (derivative(u0, start) - 1).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % 200 == 0:
            print(f"step {step}  loss {loss.item():.5f}")
    x = torch.linspace(0, math.pi, 100)[:, None]
    with torch.no_grad():
        print("largest error:", (model(x) - torch.sin(x)).abs().max().item())


if __name__ == "__main__":
    main()
