"""Twenty residual blocks whose branches are scaled by a learned number that starts at zero (ReZero).

Scary     At the first step the weights of all 20 blocks have a gradient of exactly zero.
Healthy   At the second step none has, and the run ends at an accuracy of 0.98 or more.
"""

import torch
from _command import arguments, verdict
from _datasets import blobs, minibatches
from torch import nn
from torch.nn import functional as F

ACCEPTED = ()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(32, 32)
        self.scale = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return x + self.scale * F.relu(self.linear(x))


def main():
    args = arguments(__doc__, pair=False)
    torch.manual_seed(args.seed)
    x, y = blobs(600, 20, 10, 1.0)
    model = nn.Sequential(nn.Linear(20, 32), *(Block() for _ in range(20)), nn.Linear(32, 10))
    blocks = model[1:-1]
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)

    losses, untouched = [], []
    for inputs, labels in minibatches(x, y, steps=300):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        untouched.append(sum(int(block.linear.weight.grad.abs().sum() == 0) for block in blocks))
        optimizer.step()
        losses.append(loss.item())

    accuracy = (model(x).argmax(1) == y).float().mean().item()
    verdict(
        accuracy >= 0.98, word="healthy",
        first_loss=losses[0], loss=losses[-1], accuracy=accuracy, zero_at_first=untouched[0], zero_next=untouched[1],
    )  # fmt: skip


if __name__ == "__main__":
    main()
