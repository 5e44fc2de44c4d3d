"""Advantages normalized per batch, where the last batch holds one sample.

Seen      A policy of NaN.
Cause     The unbiased standard deviation of one number is NaN.
Fix       No normalization of a single sample.
Source    github.com/DLR-RM/stable-baselines3/issues/440
Sure      A: documented by the maintainers
Repaired  Everything finite
"""

import math

import torch
from _command import arguments, verdict
from torch import nn
from torch.nn import functional as F

ACCEPTED = ("invalid-operation",)
UNREACHABLE = "The standard deviation of one sample is taken in the program's own expression."


def main():
    args = arguments(__doc__)
    torch.manual_seed(args.seed)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    states, actions, advantages = torch.randn(65, 4), torch.randint(0, 2, (65,)), torch.randn(65)

    losses = []
    for step in range(20):
        optimizer.zero_grad()
        rows = torch.arange(step % 5 * 16, min(step % 5 * 16 + 16, 65))
        advantage = advantages[rows] - advantages[rows].mean()
        if not args.fixed or len(rows) > 1:
            advantage = advantage / (advantages[rows].std() + 1e-8)
        log_p = F.log_softmax(model(states[rows]), 1).gather(1, actions[rows][:, None])[:, 0]
        loss = -(log_p * advantage).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    finite = all(map(math.isfinite, losses))
    verdict(finite, first_loss=losses[0], loss=losses[-1], finite=finite)


if __name__ == "__main__":
    main()
