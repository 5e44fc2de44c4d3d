"""A denoising diffusion model of two moons: fifty noise levels, the noise is what the network predicts."""

import argparse
import math

import torch
from sklearn.datasets import make_moons
from torch import nn

LEVELS = 50
BETA = torch.linspace(1e-3, 0.15, LEVELS)
ALPHA_BAR = (1 - BETA).cumprod(0)


class Denoiser(nn.Module):
    def __init__(self, hidden=128, frequencies=8):
        super().__init__()
        self.register_buffer("frequencies", math.pi * 2.0 ** torch.arange(frequencies) / LEVELS)
        self.inside = nn.Linear(2 + 2 * frequencies, hidden)
        self.middle = nn.Linear(hidden, hidden)
        self.outside = nn.Linear(hidden, 2)

    def forward(self, x, level):
        angle = level[:, None] * self.frequencies
        hidden = nn.functional.silu(self.inside(torch.cat([x, angle.sin(), angle.cos()], 1)))
        hidden = hidden + nn.functional.silu(self.middle(hidden))
        return self.outside(hidden)


@torch.no_grad()
def sample(model, count):
    x = torch.randn(count, 2)
    for level in reversed(range(LEVELS)):
        noise = model(x, torch.full((count,), level))
        x = (x - BETA[level] / (1 - ALPHA_BAR[level]).sqrt() * noise) / (1 - BETA[level]).sqrt()
        if level:
            x = x + BETA[level].sqrt() * torch.randn_like(x)
    return x


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    moons = torch.tensor(make_moons(4000, noise=0.05, random_state=args.seed)[0], dtype=torch.float32)
    moons = (moons - moons.mean(0)) / moons.std(0)
    model = Denoiser()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(1000):
        clean = moons[torch.randint(len(moons), (128,))]
        level, noise = torch.randint(LEVELS, (128,)), torch.randn(128, 2)
        scale = ALPHA_BAR[level][:, None]
        loss = nn.functional.mse_loss(model(scale.sqrt() * clean + (1 - scale).sqrt() * noise, level), noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 200 == 0:
            print(f"step {step}  loss {loss.item():.3f}")
    print("mean distance from the data:", torch.cdist(sample(model, 1000), moons).min(1).values.mean().item())


if __name__ == "__main__":
    main()
