"""A network in network with a ReLU on its class scores and a learning rate of 0.1.

Seen      It learns a little, then the loss is 2.302585, exactly ln 10, for ever.
Cause     One update kills the last ReLU: all scores are 0, and so is the gradient.
Fix       A learning rate of 0.01, and no ReLU on the scores.
Source    github.com/jiecaoyu/pytorch-nin-cifar10/issues/1, github.com/BVLC/caffe/issues/2051
Sure      B: several users agree
Repaired  Accuracy of 0.98 or more, and no row whose scores are all zero
"""

import torch
from _command import arguments, verdict
from _datasets import images, minibatches
from torch import nn
from torch.nn import functional as F

ACCEPTED = ("dead-units", "learning-rate-too-high")


def main():
    args = arguments(__doc__)
    torch.manual_seed(args.seed)
    x, y = images(512, noise=0.3)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 1), nn.ReLU(), nn.Conv2d(32, 32, 1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 10, 1), nn.Identity() if args.fixed else nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    for layer in model:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01 if args.fixed else 0.1, momentum=0.9)

    losses = []
    for inputs, labels in minibatches(x, y, size=32, steps=200):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    scores = model(x)
    accuracy = (scores.argmax(1) == y).float().mean().item()
    all_zero = (scores == 0).all(1).float().mean().item()
    verdict(accuracy >= 0.98 and all_zero == 0, loss=sum(losses[-20:]) / 20, accuracy=accuracy, all_zero_rows=all_zero)


if __name__ == "__main__":
    main()
