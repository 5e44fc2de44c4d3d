"""A mixture of 16 experts, two of which answer each row.

Scary     In a batch of 16 about nine experts have a gradient of exactly zero.
Healthy   They take turns: accuracy of 0.98 or more.
"""

import torch
from _command import arguments, verdict
from _datasets import blobs
from torch import nn
from torch.nn import functional as F

ACCEPTED = ()


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(10, 16)
        self.experts = nn.ModuleList([nn.Linear(10, 4) for _ in range(16)])

    def forward(self, x):
        weights, chosen = F.softmax(self.gate(x), 1).topk(2, 1)
        answers = torch.stack([expert(x) for expert in self.experts], 1)
        return (weights[..., None] * answers.gather(1, chosen[..., None].expand(-1, -1, 4))).sum(1)


def main():
    args = arguments(__doc__, pair=False)
    torch.manual_seed(args.seed)
    x, y = blobs(600, 10, 4, 1.5)
    model = Mixture()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    draw = torch.Generator().manual_seed(0)

    losses, idle = [], []
    for _ in range(300):
        rows = torch.randint(0, 600, (16,), generator=draw)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[rows]), y[rows])
        loss.backward()
        idle.append(sum(int(expert.weight.grad.abs().sum() == 0) for expert in model.experts))
        optimizer.step()
        losses.append(loss.item())

    accuracy = (model(x).argmax(1) == y).float().mean().item()
    verdict(
        accuracy >= 0.98, word="healthy",
        idle_experts=sum(idle) / len(idle), loss=sum(losses[-20:]) / 20, accuracy=accuracy,
    )  # fmt: skip


if __name__ == "__main__":
    main()
