"""Eight hidden layers of sigmoid.

Seen      The loss stays at ln 10, and the first layer's gradient is 1e-7.
Cause     A sigmoid's slope is at most 0.25: every layer takes its share of the gradient.
Fix       ReLU with He initialization (batch normalization or shortcuts help, too).
Source    stackoverflow.com/questions/46270122, github.com/microsoft/LoRA/issues/167
Sure      B: several users agree
Repaired  Accuracy of 0.95 or more, and a first layer whose gradient is over 1 % of the last one's
"""

import torch
from _command import arguments, verdict
from _datasets import blobs, minibatches
from torch import nn
from torch.nn import functional as F

ACCEPTED = ("saturating-activations",)


def main():
    args = arguments(__doc__)
    torch.manual_seed(args.seed)
    x, y = blobs()
    activation = nn.ReLU if args.fixed else nn.Sigmoid
    layers = [nn.Linear(20, 32), activation()]
    for _ in range(7):
        layers += [nn.Linear(32, 32), activation()]
    model = nn.Sequential(*layers, nn.Linear(32, 10))
    if args.fixed:
        for layer in model[::2]:
            nn.init.kaiming_normal_(layer.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    losses = []
    for inputs, labels in minibatches(x, y, steps=600):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    accuracy = (model(x).argmax(1) == y).float().mean().item()
    ratio = (model[0].weight.grad.norm() / model[-1].weight.grad.norm()).item()
    verdict(
        accuracy >= 0.95 and ratio > 1e-2, loss=sum(losses[-50:]) / 50, accuracy=accuracy, first_over_last_grad=ratio
    )


if __name__ == "__main__":
    main()
