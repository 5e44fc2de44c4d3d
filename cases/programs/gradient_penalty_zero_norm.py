"""The gradient penalty of a Wasserstein critic, where some samples switch every unit off.

Seen      The loss is NaN.
Cause     The norm of a zero gradient is the root of 0, whose derivative is infinite.
Fix       A small number under the root.
Source    github.com/keras-team/keras-io/issues/910, 624, github.com/pytorch/pytorch/issues/2534
Sure      A: a merged fix
Repaired  Everything finite, and a loss that falls
"""

import math

import torch
from _command import arguments, verdict
from torch import nn

ACCEPTED = ("singular-derivative",)
UNREACHABLE = "The norm of zero is taken in the program's own penalty."


def penalty(critic, points, eps):
    (grad,) = torch.autograd.grad(critic(points).sum(), points, create_graph=True)
    norm = (grad.pow(2).sum(1) + eps).sqrt()
    return ((norm - 1) ** 2).mean()


def main():
    args = arguments(__doc__)
    torch.manual_seed(args.seed)
    critic = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 1))
    critic[0].bias.data.fill_(-0.45)
    optimizer = torch.optim.Adam(critic.parameters(), lr=1e-3)

    losses = []
    for _ in range(80):
        optimizer.zero_grad()
        real, fake = torch.randn(64, 2) * 0.3 + 1, torch.randn(64, 2) * 0.3
        share = torch.rand(64, 1)
        between = (share * real + (1 - share) * fake).requires_grad_(True)
        slope = penalty(critic, between, 1e-12 if args.fixed else 0)
        loss = critic(fake).mean() - critic(real).mean() + 10 * slope
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    finite = all(map(math.isfinite, losses))
    verdict(finite and losses[-1] < losses[0], first_loss=losses[0], loss=losses[-1], finite=finite)


if __name__ == "__main__":
    main()
