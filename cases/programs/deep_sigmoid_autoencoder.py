"""An autoencoder of eight sigmoid layers.

Seen      The same picture comes out for every input; the loss is the variance of the data.
Cause     The stack of sigmoids starves the encoder of gradient.
Fix       ReLU with He initialization, a sigmoid on the output only.
Source    github.com/tensorflow/tensorflow/issues/48308, github.com/keras-team/keras/issues/1476
Sure      B: several users agree. With some seeds the repaired bottleneck dies in its turn
Repaired  Mean squared error below 10 % of the variance, and outputs that differ by more than 0.05
"""

from itertools import pairwise

import torch
from _command import arguments, verdict
from _datasets import images, minibatches, unit_range
from torch import nn
from torch.nn import functional as F

ACCEPTED = ("saturating-activations",)
WIDTHS = (256, 128, 64, 32, 8, 32, 64, 128, 256)


def main():
    args = arguments(__doc__)
    torch.manual_seed(args.seed)
    x = unit_range(images(400, noise=0.1)[0].flatten(1))
    activation = nn.ReLU if args.fixed else nn.Sigmoid
    layers = []
    for fan_in, fan_out in pairwise(WIDTHS):
        layers += [nn.Linear(fan_in, fan_out), activation()]
    layers[-1] = nn.Sigmoid()
    model = nn.Sequential(*layers)
    if args.fixed:
        for layer in model[::2]:
            nn.init.kaiming_normal_(layer.weight)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    losses = []
    for inputs, targets in minibatches(x, x, steps=400):
        optimizer.zero_grad()
        loss = F.mse_loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    loss, variance = sum(losses[-20:]) / 20, x.var(0).mean().item()
    spread = model(x).std(0).mean().item()
    verdict(loss < 0.1 * variance and spread > 0.05, loss=loss, variance=variance, spread=spread)


if __name__ == "__main__":
    main()
