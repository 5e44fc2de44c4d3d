"""A temporal-difference error that is clipped before it is squared.

Seen      A deep Q-network learns slowly or not at all as long as its errors are large.
Cause     Outside its range the derivative of the clipping is zero: the loss is exactly 1, and its gradient exactly 0.
Fix       The Huber loss of the error (smooth L1).
Source    github.com/devsisters/DQN-tensorflow/issues/16
Sure      A: confirmed by the owner
Repaired  Root mean squared error below 1, and a gradient at the first step
"""

import torch
from _command import arguments, verdict
from torch import nn
from torch.nn import functional as F

ACCEPTED = ("flat-loss", "unscaled-targets")
UNREACHABLE = "The error is cut in the program's own expression; another loss has to stand there."


def main():
    args = arguments(__doc__)
    torch.manual_seed(args.seed)
    x = torch.randn(512, 4)
    y = 40 + 10 * x[:, :1]
    model = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    grad_norms = []
    for _ in range(600):
        optimizer.zero_grad()
        values = model(x)
        loss = F.smooth_l1_loss(values, y) if args.fixed else (values - y).clamp(-1, 1).pow(2).mean()
        loss.backward()
        grad_norms.append(nn.utils.get_total_norm([p.grad for p in model.parameters()]).item())
        optimizer.step()

    rmse = F.mse_loss(model(x), y).sqrt().item()
    verdict(
        rmse < 1 and grad_norms[0] > 0,
        loss=loss.item(), rmse=rmse, first_grad_norm=grad_norms[0], last_grad_norm=grad_norms[-1],
    )  # fmt: skip


if __name__ == "__main__":
    main()
