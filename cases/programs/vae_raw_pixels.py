"""A variational autoencoder on pixels up to 255, whose log-variance has no bound.

Seen      The divergence term explodes; then NaN.
Cause     exp(log-variance) overflows on unscaled pixels. Every entry stays finite, the gradient's norm does not.
Fix       Pixels in [0, 1], log-variance clamped to [-10, 10].
Source    github.com/vanderschaarlab/synthcity/issues/331, github.com/AppliedDataSciencePartners/WorldModels/issues/9,
          github.com/NVlabs/NVAE/issues/27
Sure      B: several users agree
Repaired  A loss below 20
"""

import math

import torch
from _command import arguments, verdict
from _datasets import images, unit_range
from torch import nn
from torch.nn import functional as F

ACCEPTED = ("invalid-operation",)


class Autoencoder(nn.Module):
    def __init__(self, *, clamped):
        super().__init__()
        self.clamped = clamped
        self.encoder = nn.Sequential(nn.Linear(256, 128), nn.ReLU())
        self.mean, self.log_variance = nn.Linear(128, 8), nn.Linear(128, 8)
        self.decoder = nn.Sequential(nn.Linear(8, 128), nn.ReLU(), nn.Linear(128, 256))

    def forward(self, x):
        hidden = self.encoder(x)
        mean, log_variance = self.mean(hidden), self.log_variance(hidden)
        if self.clamped:
            log_variance = log_variance.clamp(-10, 10)
        code = mean + torch.randn_like(mean) * torch.exp(0.5 * log_variance)
        return self.decoder(code), mean, log_variance


def main():
    args = arguments(__doc__)
    torch.manual_seed(args.seed)
    x = unit_range(images(256, noise=0.3)[0].flatten(1)) * (1 if args.fixed else 255)
    model = Autoencoder(clamped=args.fixed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        decoded, mean, log_variance = model(x)
        divergence = -0.5 * (1 + log_variance - mean**2 - log_variance.exp()).sum(1).mean()
        loss = F.mse_loss(decoded, x, reduction="sum") / len(x) + divergence
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    finite = all(map(math.isfinite, losses))
    verdict(finite and losses[-1] < 20, first_loss=losses[0], loss=losses[-1], finite=finite)


if __name__ == "__main__":
    main()
