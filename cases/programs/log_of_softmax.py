"""The logarithm of a softmax, in two steps.

Seen      The loss is NaN.
Cause     The softmax of scores that lie far apart underflows to 0, whose logarithm is -inf, and 0 times it is NaN.
Fix       `log_softmax`.
Source    github.com/allenai/allennlp/issues/2797, github.com/bowang-lab/Transformer-GCN-QA/issues/22,
          github.com/pytorch/pytorch/issues/1620
Sure      A: merged fixes
Repaired  Everything finite, and a loss near 0
"""

import math

import torch
from _command import arguments, verdict
from _datasets import blobs
from torch import nn
from torch.nn import functional as F

ACCEPTED = ("invalid-operation",)


def main():
    args = arguments(__doc__)
    torch.manual_seed(args.seed)
    x, y = blobs(256, 20, 10, 6.0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 10))
    model[2].weight.data *= 40
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        scores = model(x)
        log_p = F.log_softmax(scores, 1) if args.fixed else torch.log(torch.softmax(scores, 1))
        loss = -(log_p * F.one_hot(y, 10)).sum(1).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    finite = all(map(math.isfinite, losses))
    verdict(finite and losses[-1] < 0.01, first_loss=losses[0], loss=losses[-1], finite=finite)


if __name__ == "__main__":
    main()
