"""Attention over a batch in which one sample is all padding.

Seen      One empty sample turns all weights into NaN.
Cause     The softmax of a row of -inf is NaN.
Fix       Rows that are all padding are not masked.
Source    github.com/pytorch/pytorch/issues/41508, 160064
Sure      A: confirmed by maintainers
Repaired  Everything finite
"""

import math

import torch
from _command import arguments, verdict
from torch import nn
from torch.nn import functional as F

ACCEPTED = ("invalid-operation",)
UNREACHABLE = "Which positions are masked is settled in the program's own forward pass."


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(12, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, tokens, padding):
        x = self.embedding(tokens)
        attended, _ = self.attention(x, x, x, key_padding_mask=padding, need_weights=True)
        return self.head(attended.mean(1))


def main():
    args = arguments(__doc__)
    torch.manual_seed(args.seed)
    model = Classifier()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 12, (256, 6), generator=draw)
    y = tokens[:, 0] % 3
    tokens[77] = 0  # the empty sample

    losses = []
    for step in range(80):
        rows = torch.randint(0, 256, (32,), generator=draw)
        if step == 20:
            rows[0] = 77
        padding = tokens[rows] == 0
        if args.fixed:
            padding &= ~padding.all(1, keepdim=True)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens[rows], padding), y[rows])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    finite = all(map(math.isfinite, losses))
    verdict(finite, first_loss=losses[0], loss=losses[-1], finite=finite)


if __name__ == "__main__":
    main()
