"""A generative adversarial network (non-saturating loss) that learns a ring of points in the plane."""

import argparse
import math

import torch
from torch import nn


def real_points(count):
    angle = 2 * math.pi * torch.rand(count)
    return torch.stack([angle.cos(), angle.sin()], 1) + 0.05 * torch.randn(count, 2)


def network(inputs, outputs):
    return nn.Sequential(
        nn.Linear(inputs, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, outputs)
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    generator, discriminator = network(4, 2), network(2, 1)
    criterion = nn.BCEWithLogitsLoss()
    g_optimizer = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.999))
    d_optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-3, betas=(0.5, 0.999))
    ones, zeros = torch.ones(128, 1), torch.zeros(128, 1)
    for step in range(600):
        fake = generator(torch.randn(128, 4))
        d_loss = criterion(discriminator(real_points(128)), ones) + criterion(discriminator(fake.detach()), zeros)
        d_optimizer.zero_grad()
        d_loss.backward()
        d_optimizer.step()

        g_loss = criterion(discriminator(fake), ones)
        g_optimizer.zero_grad()
        g_loss.backward()
        g_optimizer.step()
        if step % 100 == 0:
            print(f"step {step}  discriminator {d_loss.item():.3f}  generator {g_loss.item():.3f}")
    with torch.no_grad():
        radius = generator(torch.randn(2000, 4)).norm(dim=1)
    print("mean distance from the ring:", (radius - 1).abs().mean().item())


if __name__ == "__main__":
    main()
