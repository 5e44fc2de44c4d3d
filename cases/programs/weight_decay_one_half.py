"""A weight decay of 0.5.

Seen      The same output for every input.
Cause     The decay outweighs the gradient and shrinks the weights away.
Fix       5e-4.
Source    github.com/BVLC/caffe/issues/1396
Sure      B: a comment in the thread
Repaired  Accuracy of 0.98 or more
"""

import torch
from _command import arguments, verdict
from _datasets import blobs, minibatches
from torch import nn
from torch.nn import functional as F

ACCEPTED = ("weight-decay-too-strong",)


def main():
    args = arguments(__doc__)
    torch.manual_seed(args.seed)
    x, y = blobs(600, 20, 4, 1.5)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    decay = 5e-4 if args.fixed else 0.5
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=decay)

    losses = []
    for inputs, labels in minibatches(x, y, steps=300):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    accuracy = (model(x).argmax(1) == y).float().mean().item()
    norm = sum(parameter.norm().item() for parameter in model.parameters())
    verdict(accuracy >= 0.98, loss=sum(losses[-20:]) / 20, accuracy=accuracy, weight_norm=norm)


if __name__ == "__main__":
    main()
