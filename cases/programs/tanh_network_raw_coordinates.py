"""A tanh network on inputs of the order of 500.

Seen      It always predicts the same class: loss 0.693, accuracy 0.5.
Cause     In the first layer 99.6 % of the tanh are saturated, and its gradient is exactly 0.
Fix       Standardized inputs.
Source    github.com/keras-team/keras/issues/2975, github.com/keras-team/keras/issues/2711
Sure      B: several users agree
Repaired  Accuracy of 0.98 or more, and fewer than 5 % of the first layer saturated at the start
"""

import torch
from _command import arguments, verdict
from _datasets import minibatches, moons, standardized
from torch import nn
from torch.nn import functional as F

ACCEPTED = ("unscaled-inputs", "saturating-activations")


def main():
    args = arguments(__doc__)
    torch.manual_seed(args.seed)
    x, y = moons()
    x = standardized(x) if args.fixed else x * 100 + 500
    model = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))
    saturated = []
    model[1].register_forward_hook(lambda _, __, out: saturated.append((out.abs() > 0.99).float().mean().item()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    losses = []
    for inputs, labels in minibatches(x, y, steps=1500):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    accuracy = (model(x).argmax(1) == y).float().mean().item()
    verdict(
        accuracy >= 0.98 and saturated[0] < 0.05,
        loss=sum(losses[-50:]) / 50, accuracy=accuracy, saturated=saturated[0],
    )  # fmt: skip


if __name__ == "__main__":
    main()
