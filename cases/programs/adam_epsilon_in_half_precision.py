"""Adam with its usual epsilon on weights in half precision.

Seen      NaN at the second step.
Cause     1e-8 is 0 in float16: where the gradient is 0, the update is 0/0.
Fix       An epsilon of 1e-4 (or optimizer states in float32).
Source    github.com/keras-team/keras/issues/11860, github.com/pytorch/pytorch/issues/8860, 26218,
          github.com/NVIDIA/apex/issues/240
Sure      A: confirmed by maintainers
Repaired  Everything finite, and a loss below 0.05
"""

import math

import torch
from _command import arguments, verdict
from _datasets import blobs
from torch import nn
from torch.nn import functional as F

ACCEPTED = ("epsilon-too-small", "precision-underflow")


def main():
    args = arguments(__doc__)
    torch.manual_seed(args.seed)
    x, y = blobs(600, 20, 4, 1.0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 4)).half()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=1e-4 if args.fixed else 1e-8, foreach=False)

    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x.half()).float(), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    finite = all(map(math.isfinite, losses))
    verdict(finite and losses[-1] < 0.05, first_loss=losses[0], loss=losses[-1], finite=finite)


if __name__ == "__main__":
    main()
