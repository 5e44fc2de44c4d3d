"""A Gaussian negative log-likelihood with a learned scale.

Scary     The loss goes below zero, to -3.5.
Healthy   A density may exceed 1 (github.com/jwchoi384/Gaussian_YOLOv3/issues/19, 23).
"""

import torch
from _command import arguments, verdict
from _datasets import minibatches
from torch import nn

ACCEPTED = ()


def negative_log_likelihood(predictions, targets):
    log_scale = predictions[:, 1:].clamp(-6, 3)
    return (log_scale + 0.5 * ((targets - predictions[:, :1]) * torch.exp(-log_scale)) ** 2).mean()


def main():
    args = arguments(__doc__, pair=False)
    torch.manual_seed(args.seed)
    x = torch.randn(500, 3)
    y = x[:, :1] * 0.1 + 0.01 * torch.randn(500, 1)
    model = nn.Sequential(nn.Linear(3, 32), nn.ReLU(), nn.Linear(32, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    losses = []
    for inputs, targets in minibatches(x, y, steps=800):
        optimizer.zero_grad()
        loss = negative_log_likelihood(model(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    loss = sum(losses[-20:]) / 20
    verdict(loss < -3, word="healthy", first_loss=losses[0], loss=loss)


if __name__ == "__main__":
    main()
