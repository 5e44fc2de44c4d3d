"""A regression whose targets lie around 50.

Scary     The first loss is 2464 and the first gradient 186.
Healthy   Both come down at once, as soon as the output's bias has found the offset.
"""

import torch
from _command import arguments, verdict
from _datasets import minibatches
from torch import nn
from torch.nn import functional as F

ACCEPTED = ()


def main():
    args = arguments(__doc__, pair=False)
    torch.manual_seed(args.seed)
    x = torch.randn(400, 5)
    y = x @ torch.randn(5, 1) + 50
    model = nn.Sequential(nn.Linear(5, 32), nn.ReLU(), nn.Linear(32, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    losses, grad_norms = [], []
    for inputs, targets in minibatches(x, y, steps=600):
        optimizer.zero_grad()
        loss = F.mse_loss(model(inputs), targets)
        loss.backward()
        grad_norms.append(nn.utils.get_total_norm([p.grad for p in model.parameters()]).item())
        optimizer.step()
        losses.append(loss.item())

    loss, variance = sum(losses[-20:]) / 20, y.var().item()
    verdict(
        loss < variance, word="healthy",
        first_loss=losses[0], loss=loss, variance=variance, first_grad=grad_norms[0], last_grad=grad_norms[-1],
    )  # fmt: skip


if __name__ == "__main__":
    main()
