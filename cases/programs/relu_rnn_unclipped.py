"""The adding problem over 60 steps with a ReLU recurrent network whose recurrent matrix is too large.

Seen      NaN after some iterations.
Cause     A spectral radius above 1, to the power of the sequence's length.
Fix       An identity as recurrent matrix, and gradients clipped to a norm of 1.
Source    github.com/Marcovaldong/lstmp.pytorch/issues/2, github.com/asappresearch/sru/issues/2
Sure      B: the author's own solution
Repaired  Everything finite, and an error below the variance
"""

import math

import torch
from _command import arguments, verdict
from _datasets import minibatches
from torch import nn
from torch.nn import functional as F

ACCEPTED = ("recurrent-explosion",)


class Adder(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.RNN(2, 48, batch_first=True, nonlinearity="relu")
        self.head = nn.Linear(48, 1)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


def marked_numbers(rows=256, length=60):
    """Numbers with two marks: x [rows, length, 2]; y [rows, 1] is the sum of the marked ones."""
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(rows, length, 2, generator=draw)
    x[:, :, 1] = 0
    marks = torch.randint(0, length, (rows, 2), generator=draw)
    x[torch.arange(rows), marks[:, 0], 1] = 1
    x[torch.arange(rows), marks[:, 1], 1] = 1
    return x, (x[:, :, 0] * x[:, :, 1]).sum(1, keepdim=True)


def main():
    args = arguments(__doc__)
    torch.manual_seed(args.seed)
    x, y = marked_numbers()
    model = Adder()
    torch.manual_seed(args.seed)
    if args.fixed:
        nn.init.eye_(model.rnn.weight_hh_l0)
        nn.init.normal_(model.rnn.weight_ih_l0, 0, 0.03)
        nn.init.zeros_(model.rnn.bias_hh_l0)
        nn.init.zeros_(model.rnn.bias_ih_l0)
    else:
        nn.init.normal_(model.rnn.weight_hh_l0, 0, 1.5 / math.sqrt(48))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    losses, grad_norms = [], []
    for inputs, targets in minibatches(x, y, size=32, steps=300):
        optimizer.zero_grad()
        loss = F.mse_loss(model(inputs), targets)
        loss.backward()
        grad_norms.append(nn.utils.get_total_norm([p.grad for p in model.parameters()]).item())
        if args.fixed:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())

    finite = all(map(math.isfinite, losses))
    largest = max(filter(math.isfinite, grad_norms))
    verdict(
        finite and losses[-1] < y.var().item(),
        first_loss=losses[0], loss=losses[-1], finite=finite, largest_grad_norm=largest,
    )  # fmt: skip


if __name__ == "__main__":
    main()
