"""A mean squared error of predictions [B, 1] and targets [B].

Seen      The model predicts the mean and the loss stays at the variance of the targets; only a UserWarning tells.
Cause     The shapes broadcast to [B, B]: every prediction is compared with every target, and the mean is optimal.
Fix       Equal shapes.
Source    github.com/deepset-ai/FARM/issues/229 (fixed in 230), github.com/pytorch/pytorch/issues/16045
Sure      A: a merged fix
Repaired  Mean squared error below 1 % of the variance, and predictions that vary like the targets
"""

import torch
from _command import arguments, verdict
from _datasets import minibatches
from torch import nn
from torch.nn import functional as F

ACCEPTED = ("broadcast-loss",)
UNREACHABLE = "Two shapes that do not fit meet in the program's own loss."


def main():
    args = arguments(__doc__)
    torch.manual_seed(args.seed)
    x = torch.randn(400, 5)
    y = x @ torch.randn(5) + 0.5 * x[:, 0] ** 2
    model = nn.Sequential(nn.Linear(5, 64), nn.ReLU(), nn.Linear(64, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    losses = []
    for inputs, targets in minibatches(x, y, steps=600):
        optimizer.zero_grad()
        predictions = model(inputs)
        loss = F.mse_loss(predictions[:, 0] if args.fixed else predictions, targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    predictions = model(x)[:, 0]
    share = (F.mse_loss(predictions, y) / y.var()).item()
    verdict(
        share < 0.01 and predictions.std() > 0.9 * y.std(),
        loss=sum(losses[-20:]) / 20, share_of_variance=share, std_of_predictions=predictions.std().item(),
    )  # fmt: skip


if __name__ == "__main__":
    main()
