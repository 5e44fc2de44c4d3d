"""Weights kept in bfloat16, trained with Adam at 3e-4.

Seen      The loss falls slowly and levels off.
Cause     Updates below 2^-8 of a weight are rounded away; those of the layer norm, at 1.0, never move.
Fix       Weights in float32 with autocast (or stochastic rounding).
Source    github.com/pytorch/ao/issues/1124, github.com/workofart/ml-by-hand/issues/85,
          github.com/meta-pytorch/torchtune/issues/2254
Sure      A: measured in the threads
Repaired  Every entry of the layer norm's weight moved, and a loss below 0.3
"""

import contextlib

import torch
from _command import arguments, verdict
from _datasets import blobs
from torch import nn
from torch.nn import functional as F

ACCEPTED = ("update-below-precision",)


def main():
    args = arguments(__doc__)
    torch.manual_seed(args.seed)
    x, y = blobs(600, 20, 10, 1.0)
    model = nn.Sequential(nn.Linear(20, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 10))
    if not args.fixed:
        model, x = model.bfloat16(), x.bfloat16()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)

    losses = []
    for _ in range(600):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16) if args.fixed else contextlib.nullcontext():
            scores = model(x)
        loss = F.cross_entropy(scores.float(), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    moved = (model[1].weight != 1).float().mean().item()
    verdict(moved == 1 and losses[-1] < 0.3, first_loss=losses[0], loss=losses[-1], moved_norm_weights=moved)


if __name__ == "__main__":
    main()
