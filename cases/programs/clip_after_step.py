"""Gradients that are clipped after the optimizer's step.

Seen      The maximum norm seems to do nothing: explosions remain.
Cause     The step has used the raw gradient before it is clipped.
Fix       Backward, clip, step: in this order.
Source    github.com/awslabs/graphstorm/issues/1366 (five trainers), github.com/VGraphRNN/VGRNN/issues/4,
          github.com/taesunwhang/UMS-ResSel/issues/3, github.com/jongwook/onsets-and-frames/issues/24
Sure      A: fixed by the maintainers
Repaired  Everything finite, and a loss below 0.6 of the first
"""

import math

import torch
from _command import arguments, verdict
from torch import nn
from torch.nn import functional as F

ACCEPTED = ("clip-misplaced", "recurrent-explosion")


class Summation(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.RNN(3, 32, batch_first=True, nonlinearity="relu")
        nn.init.orthogonal_(self.rnn.weight_hh_l0)
        self.rnn.weight_hh_l0.data *= 1.12
        self.head = nn.Linear(32, 1)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


def main():
    args = arguments(__doc__)
    torch.manual_seed(args.seed)
    x = torch.randn(256, 40, 3, generator=torch.Generator().manual_seed(0)) * 0.3
    y = x[:, :, 0].sum(1, keepdim=True)
    model = Summation()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    losses = []
    for _ in range(300):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        if args.fixed:
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        losses.append(loss.item())
        if not args.fixed:
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)

    finite = all(map(math.isfinite, losses))
    verdict(finite and losses[-1] < 0.6 * losses[0], first_loss=losses[0], loss=losses[-1], finite=finite)


if __name__ == "__main__":
    main()
