"""Images scaled by their own minimum and maximum, one of them constant.

Seen      NaN "sooner or later".
Cause     (x - min) / (max - min) of a constant image is 0/0: the inputs hold NaN before the model sees them.
Fix       A denominator of at least 1e-6.
Source    github.com/avalonstrel/GatedConvolution_pytorch/issues/27, github.com/prs-eth/Marigold/issues/111
Sure      A: found by the one who asked
Repaired  Everything finite
"""

import math

import torch
from _command import arguments, verdict
from _datasets import images
from torch import nn
from torch.nn import functional as F

ACCEPTED = ("nonfinite-inputs",)
UNREACHABLE = "The data is divided by zero before it enters the model."


def main():
    args = arguments(__doc__)
    torch.manual_seed(args.seed)
    x, y = images(256, noise=0.2)
    x[13] = 0.5  # the constant image
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    x = (x - low) / ((high - low).clamp_min(1e-6) if args.fixed else high - low)
    model = nn.Sequential(nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    draw = torch.Generator().manual_seed(0)

    losses = []
    for _ in range(80):
        optimizer.zero_grad()
        rows = torch.randint(0, 256, (32,), generator=draw)
        loss = F.cross_entropy(model(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    finite = all(map(math.isfinite, losses))
    bad_rows = int(x.isnan().flatten(1).any(1).sum())
    verdict(finite and bad_rows == 0, first_loss=losses[0], loss=losses[-1], finite=finite, nan_rows=bad_rows)


if __name__ == "__main__":
    main()
