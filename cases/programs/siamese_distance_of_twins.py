"""A Siamese network whose distance is the square root of a sum of squares.

Seen      NaN "suddenly in some iteration".
Cause     The derivative of the root at 0 is infinite, and two rows of the data are the same.
Fix       A small number under the root (`torch.linalg.vector_norm` has a subgradient of 0 there).
Source    github.com/adambielski/siamese-triplet/issues/18, github.com/tensorflow/tensorflow/issues/30199,
          github.com/huggingface/sentence-transformers/issues/4033
Sure      A: fixed by the author
Repaired  Everything finite
"""

import math

import torch
from _command import arguments, verdict
from _datasets import blobs
from torch import nn
from torch.nn import functional as F

ACCEPTED = ("singular-derivative",)
UNREACHABLE = "The root of zero is taken in the program's own distance."


def main():
    args = arguments(__doc__)
    torch.manual_seed(args.seed)
    x, y = blobs(200, 10, 4, 1.0)
    x[1], y[1] = x[0], y[0]  # the twins
    model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 8))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    losses = []
    for step in range(100):
        optimizer.zero_grad()
        rows = torch.arange(0, 64) if step == 5 else torch.randint(2, 200, (64,))
        embedded = model(x[rows])
        left, right = embedded[0::2], embedded[1::2]
        same = (y[rows][0::2] == y[rows][1::2]).float()
        squared = (left - right).pow(2).sum(1)
        distance = (squared + 1e-9).sqrt() if args.fixed else squared.sqrt()
        contrast = same * distance.pow(2) + (1 - same) * F.relu(2 - distance).pow(2)
        loss = contrast.mean() + 0.01 * distance.mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    finite = all(map(math.isfinite, losses))
    verdict(finite, first_loss=losses[0], loss=losses[-1], finite=finite)


if __name__ == "__main__":
    main()
