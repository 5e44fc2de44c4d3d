"""A cross-entropy over small batches in which 80 % of the labels are to be ignored: it looks bad and is not.

Seen      The loss is NaN for some batches.
Cause     The mean over no label is 0/0. The gradient of such a batch is 0, and nothing is damaged.
Fix       The sum over the number of labels, at least 1.
Source    github.com/pytorch/pytorch/issues/70348 ("does not affect model training"), 116349, 75181
Sure      A: confirmed by maintainers
Repaired  A loss that is finite at every step. The training itself needs no repair: an error is wrong
"""

import math

import torch
from _command import arguments, verdict
from _datasets import blobs
from torch import nn
from torch.nn import functional as F

ACCEPTED = ("invalid-operation",)
UNREACHABLE = "Which labels a batch has is settled by the program's own data."
HARMLESS = True


def main():
    args = arguments(__doc__)
    torch.manual_seed(args.seed)
    x, y = blobs(512, 10, 4, 1.0)
    y[torch.rand(512, generator=torch.Generator().manual_seed(1)) < 0.8] = -100
    model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    draw = torch.Generator().manual_seed(0)

    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        rows = torch.randint(0, 512, (8,), generator=draw)
        labels = y[rows]
        if args.fixed:
            counted = (labels != -100).sum().clamp_min(1)
            loss = F.cross_entropy(model(x[rows]), labels, reduction="sum") / counted
        else:
            loss = F.cross_entropy(model(x[rows]), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    finite = all(map(math.isfinite, losses))
    verdict(finite, first_loss=losses[0], loss=losses[-1], finite=finite)


if __name__ == "__main__":
    main()
