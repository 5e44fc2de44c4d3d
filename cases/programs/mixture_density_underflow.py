"""A mixture density network whose likelihood is computed before its logarithm.

Seen      The loss goes to inf, then to NaN.
Cause     exp(-z^2 / 2) underflows to 0 far from every component, and the logarithm of 0 is -inf.
Fix       `logsumexp` of the logarithms.
Source    github.com/keras-team/keras/issues/1061
Sure      B: several users agree
Repaired  Everything finite, and a negative log-likelihood below 3
"""

import math

import torch
from _command import arguments, verdict
from torch import nn
from torch.nn import functional as F

ACCEPTED = ("invalid-operation",)
UNREACHABLE = "The logarithm of zero is taken in the program's own loss."
COMPONENTS = 5


def stable_loss(shares, means, log_scales, t):
    z = (t - means) * torch.exp(-log_scales)
    return -torch.logsumexp(F.log_softmax(shares, 1) - log_scales - 0.5 * z**2 - 0.919, 1).mean()


def plain_loss(shares, means, log_scales, t):
    scales = log_scales.exp()
    densities = torch.exp(-0.5 * ((t - means) / scales) ** 2) / (scales * 2.5066)
    return -torch.log((F.softmax(shares, 1) * densities).sum(1)).mean()


def main():
    args = arguments(__doc__)
    torch.manual_seed(args.seed)
    t = torch.rand(512, 1, generator=torch.Generator().manual_seed(0)) * 60 - 30
    x = t / 10 + 0.3 * torch.sin(t)
    model = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 3 * COMPONENTS))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    criterion = stable_loss if args.fixed else plain_loss

    losses = []
    for _ in range(300):
        optimizer.zero_grad()
        loss = criterion(*model(x).chunk(3, 1), t)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    finite = all(map(math.isfinite, losses))
    verdict(finite and losses[-1] < 3, first_loss=losses[0], loss=losses[-1], finite=finite)


if __name__ == "__main__":
    main()
