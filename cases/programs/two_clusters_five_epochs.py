"""Two hundred points, five epochs: 35 updates in all.

Seen      Accuracy 0.5.
Cause     Nothing is wrong but the number of updates.
Fix       50 epochs, and a learning rate of 0.01.
Source    stackoverflow.com/questions/50306988 (likewise 44164749, 37213388)
Sure      A: the accepted answer
Repaired  Accuracy 1
"""

import torch
from _command import arguments, verdict
from _datasets import minibatches
from torch import nn
from torch.nn import functional as F

ACCEPTED = ("undertrained", "learning-rate-too-low")


def main():
    args = arguments(__doc__)
    torch.manual_seed(args.seed)
    near, far = torch.rand(100, 2) * 0.2 + 0.2, torch.rand(100, 2) * 0.2 + 0.5
    x, y = torch.cat([near, far]), torch.tensor([0] * 100 + [1] * 100)
    model = nn.Sequential(nn.Linear(2, 2), nn.Sigmoid(), nn.Linear(2, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2 if args.fixed else 1e-3)
    epochs = 50 if args.fixed else 5

    for inputs, labels in minibatches(x, y, size=32, steps=7 * epochs):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()

    accuracy = (model(x).argmax(1) == y).float().mean().item()
    verdict(accuracy == 1, loss=loss.item(), accuracy=accuracy)


if __name__ == "__main__":
    main()
