"""A focal loss with an exponent of 0.5.

Seen      NaN after some steps, only for exponents between 0 and 1.
Cause     The derivative of (1 - p)^0.5 at p = 1 is infinite.
Fix       A small number inside the power as well as inside the logarithm.
Source    github.com/kornia/kornia/issues/918, github.com/google-deepmind/optax/issues/1267,
          github.com/fizyr/keras-retinanet/issues/706
Sure      A: fixed by the maintainers
Repaired  Everything finite, and a loss near 0
"""

import math

import torch
from _command import arguments, verdict
from _datasets import blobs
from torch import nn

ACCEPTED = ("singular-derivative",)
UNREACHABLE = "The power of zero is taken in the program's own loss."


def main():
    args = arguments(__doc__)
    torch.manual_seed(args.seed)
    x, y = blobs(256, 10, 2, 5.0)
    targets = y.float()[:, None]
    model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-2)
    eps = 1e-6 if args.fixed else 1e-8
    inside = eps if args.fixed else 0

    losses = []
    for _ in range(300):
        optimizer.zero_grad()
        p = torch.sigmoid(model(x))
        positive, negative = (1 - p + inside).pow(0.5), (p + inside).pow(0.5)
        loss = (-positive * targets * (p + eps).log() - negative * (1 - targets) * (1 - p + eps).log()).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    finite = all(map(math.isfinite, losses))
    verdict(finite and losses[-1] < 0.01, first_loss=losses[0], loss=losses[-1], finite=finite)


if __name__ == "__main__":
    main()
