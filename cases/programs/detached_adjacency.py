"""A graph network whose learned adjacency is detached.

Seen      Two weight matrices are never updated.
Cause     `detach()` (elsewhere `item()`, or a detour over NumPy) cuts the graph.
Fix       Without it.
Source    github.com/queenie88/A-GCN/issues/4, github.com/isayev/ReLeaSE/issues/39
Sure      A: removed by the author
Repaired  A gradient for those matrices, and a loss below 0.1
"""

import torch
from _command import arguments, verdict
from torch import nn
from torch.nn import functional as F

ACCEPTED = ("parameters-unreached",)
UNREACHABLE = "The graph is cut inside of the program's own forward pass."


class LearnedGraph(nn.Module):
    def __init__(self, *, detached):
        super().__init__()
        self.detached = detached
        self.left, self.right = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        adjacency = F.softmax(self.left(x) @ self.right(x).T, 1)
        return self.head((adjacency.detach() if self.detached else adjacency) @ x)


def main():
    args = arguments(__doc__)
    torch.manual_seed(args.seed)
    y = torch.arange(90) % 3
    x = torch.randn(90, 8)
    x[:, :3] += 2 * F.one_hot(y, 3)
    model = LearnedGraph(detached=not args.fixed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    before = model.left.weight.detach().clone()

    for _ in range(150):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()

    moved = (model.left.weight - before).norm().item()
    reached = model.left.weight.grad is not None
    verdict(reached and loss.item() < 0.1, loss=loss.item(), moved=moved, reached=reached)


if __name__ == "__main__":
    main()
