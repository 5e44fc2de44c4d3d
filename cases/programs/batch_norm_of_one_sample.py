"""A handwritten batch normalization with the unbiased variance, and a last batch of one sample.

Seen      The running variance is NaN, and evaluation is broken.
Cause     A variance divided by n - 1 = 0.
Fix       Running statistics for a single sample (or dropping the last batch).
Source    github.com/facebookresearch/SparseConvNet/issues/190, 105, github.com/karpathy/makemore/issues/22
Sure      A: confirmed in the threads
Repaired  A finite running variance
"""

import math

import torch
from _command import arguments, verdict
from _datasets import blobs
from torch import nn
from torch.nn import functional as F

ACCEPTED = ("invalid-operation", "batch-statistics")
UNREACHABLE = "How many rows the last batch has is settled by the program's own loader."


class BatchNorm(nn.Module):
    def __init__(self, width, *, skips_single):
        super().__init__()
        self.skips_single = skips_single
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))
        self.register_buffer("running_mean", torch.zeros(width))

    def forward(self, x):
        if self.training and (len(x) > 1 or not self.skips_single):
            mean, var = x.mean(0), x.var(0)
            self.running_mean.lerp_(mean.detach(), 0.1)
            self.running_var.lerp_(var.detach(), 0.1)
        else:
            mean, var = self.running_mean, self.running_var
        return (x - mean) / (var + 1e-5).sqrt() * self.weight + self.bias


def main():
    args = arguments(__doc__)
    torch.manual_seed(args.seed)
    x, y = blobs(129, 20, 4, 1.0)
    norm = BatchNorm(32, skips_single=args.fixed)
    model = nn.Sequential(nn.Linear(20, 32), norm, nn.ReLU(), nn.Linear(32, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    losses = []
    for _ in range(5):
        for start in range(0, 129, 32):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[start : start + 32]), y[start : start + 32])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())

    finite = all(map(math.isfinite, losses))
    verdict(norm.running_var.isfinite().all().item(), first_loss=losses[0], loss=losses[-1], finite=finite)


if __name__ == "__main__":
    main()
