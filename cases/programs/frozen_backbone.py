"""A linear head on random convolutional features that are frozen on purpose.

Scary     The frozen parameters never change.
Healthy   The head learns: accuracy of 0.98 or more.
"""

import torch
from _command import arguments, verdict
from _datasets import images, minibatches
from torch import nn
from torch.nn import functional as F

ACCEPTED = ()


def main():
    args = arguments(__doc__, pair=False)
    torch.manual_seed(args.seed)
    x, y = images(512, noise=0.3)
    backbone = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten()
    )
    backbone.requires_grad_(False)
    head = nn.Linear(512, 10)
    model = nn.Sequential(backbone, head)
    optimizer = torch.optim.Adam(head.parameters(), lr=5e-3)

    losses = []
    for inputs, labels in minibatches(x, y, steps=300):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    model.eval()
    accuracy = (model(x).argmax(1) == y).float().mean().item()
    verdict(accuracy >= 0.98, word="healthy", first_loss=losses[0], loss=losses[-1], accuracy=accuracy)


if __name__ == "__main__":
    main()
