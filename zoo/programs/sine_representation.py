"""An image as a network of sines (SIREN): coordinates in, brightness out."""

import argparse

import torch
from torch import nn


class Sine(nn.Module):
    def __init__(self, inside, outside, first=False, omega=30.0):
        super().__init__()
        self.omega = omega
        self.linear = nn.Linear(inside, outside)
        bound = 1 / inside if first else (6 / inside) ** 0.5 / omega
        nn.init.uniform_(self.linear.weight, -bound, bound)

    def forward(self, x):
        return torch.sin(self.omega * self.linear(x))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    axis = torch.linspace(-1, 1, 32)
    coordinates = torch.cartesian_prod(axis, axis)
    radius, angle = coordinates.norm(dim=1), torch.atan2(coordinates[:, 1], coordinates[:, 0])
    brightness = (torch.cos(12 * radius + 3 * angle) * torch.exp(-radius))[:, None]
    model = nn.Sequential(Sine(2, 64, first=True), Sine(64, 64), Sine(64, 64), nn.Linear(64, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-4)
    for step in range(250):
        loss = ((model(coordinates) - brightness) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}  loss {loss.item():.5f}")
    print("unexplained variance:", (loss / brightness.var()).item())


if __name__ == "__main__":
    main()
