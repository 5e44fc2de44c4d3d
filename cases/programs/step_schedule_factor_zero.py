"""A step schedule that multiplies the learning rate with 0, meant to switch the schedule off.

Seen      The loss freezes at the first boundary of the schedule.
Cause     After ten epochs the learning rate is exactly 0.
Fix       A factor of 1.
Source    github.com/LINCellularNeuroscience/VAME/issues/26
Sure      A: confirmed by the owner
Repaired  Weights that still move at the end, and a loss that fell after the boundary
"""

import torch
from _command import arguments, verdict
from _datasets import blobs, minibatches
from torch import nn
from torch.nn import functional as F

ACCEPTED = ("learning-rate-decayed",)


def main():
    args = arguments(__doc__)
    torch.manual_seed(args.seed)
    x, y = blobs(600, 20, 10, 1.0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10, gamma=1.0 if args.fixed else 0.0)

    losses = []
    for epoch in range(40):
        before = model[0].weight.detach().clone()
        for inputs, labels in minibatches(x, y, steps=9, seed=epoch):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        scheduler.step()

    boundary, loss = sum(losses[80:90]) / 10, sum(losses[-10:]) / 10
    moved = (model[0].weight - before).norm().item()
    verdict(moved > 0 and loss < boundary / 2, loss_at_boundary=boundary, loss=loss, moved_in_last_epoch=moved)


if __name__ == "__main__":
    main()
