"""A `torch.where` that hides the root of a negative number.

Seen      The loss is finite, and the gradient NaN from the first step on.
Cause     The gradient of the branch that was not chosen is 0 times NaN.
Fix       A second `where` that keeps negative numbers out of the root.
Source    github.com/pytorch/pytorch/issues/16317, 18287, 52248, 68425, github.com/jax-ml/jax/issues/5798
Sure      A: explained by maintainers
Repaired  Everything finite, and a loss below 0.01
"""

import math

import torch
from _command import arguments, verdict
from torch import nn
from torch.nn import functional as F

ACCEPTED = ("singular-derivative",)
UNREACHABLE = "The branch that is not chosen is computed in the program's own expression."


def main():
    args = arguments(__doc__)
    torch.manual_seed(args.seed)
    x = torch.randn(256, 4, generator=torch.Generator().manual_seed(0))
    y = F.relu(x[:, :1]).sqrt()
    model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        z = model(x)
        positive = torch.where(z > 0, z, torch.ones_like(z)) if args.fixed else z
        loss = F.mse_loss(torch.where(z > 0, positive.sqrt(), 0.1 * z), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    finite = all(map(math.isfinite, losses))
    verdict(finite and losses[-1] < 0.01, first_loss=losses[0], loss=losses[-1], finite=finite)


if __name__ == "__main__":
    main()
