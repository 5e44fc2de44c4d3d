"""A low-rank adapter on a frozen network whose two factors both start at zero.

Seen      No training at all.
Cause     The gradient of each factor is proportional to the other one: both are exactly zero.
Fix       Random numbers in one factor, zero in the other.
Source    github.com/nvidia-cosmos/cosmos-predict2.5/issues/15, github.com/Guitaricet/relora/issues/18
Sure      A: confirmed in the threads
Repaired  A loss below 0.5
"""

import torch
from _command import arguments, verdict
from _datasets import blobs
from torch import nn
from torch.nn import functional as F

ACCEPTED = ("zero-initialization",)


def main():
    args = arguments(__doc__)
    torch.manual_seed(args.seed)
    x, y = blobs(600, 20, 10, 1.0)
    hidden = nn.Linear(20, 64).requires_grad_(False)
    down = nn.Parameter(torch.randn(4, 20) * 0.1 if args.fixed else torch.zeros(4, 20))
    up = nn.Parameter(torch.zeros(64, 4))
    head = nn.Linear(64, 10).requires_grad_(False)
    optimizer = torch.optim.Adam([down, up], lr=1e-2)

    losses = []
    for _ in range(300):
        optimizer.zero_grad()
        loss = F.cross_entropy(head(F.relu(hidden(x) + x @ down.T @ up.T)), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    norms = {"grad_norm_down": down.grad.norm().item(), "grad_norm_up": up.grad.norm().item()}
    verdict(losses[-1] < 0.5, first_loss=losses[0], loss=losses[-1], **norms)


if __name__ == "__main__":
    main()
