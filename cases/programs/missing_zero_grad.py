"""A loop that never clears its gradients.

Seen      It looks like a learning rate that is too high, and users tune that instead.
Cause     Gradients pile up from step to step.
Fix       `optimizer.zero_grad()` in every iteration.
Source    stackoverflow.com/questions/60335387, github.com/pytorch/pytorch/issues/47175
Sure      A: the accepted answer
Repaired  A loss that ends below a tenth of the first (the accuracy is high with the fault, too)
"""

import torch
from _command import arguments, verdict
from _datasets import images
from torch import nn
from torch.nn import functional as F

ACCEPTED = ("missing-zero-grad",)


def main():
    args = arguments(__doc__)
    torch.manual_seed(args.seed)
    x, y = images(512)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    draw = torch.Generator().manual_seed(0)

    losses, grad_norms = [], []
    for _ in range(200):
        rows = torch.randint(0, 512, (32,), generator=draw)
        if args.fixed:
            optimizer.zero_grad()
        loss = F.cross_entropy(model(x[rows]), y[rows])
        loss.backward()
        grad_norms.append(nn.utils.get_total_norm([p.grad for p in model.parameters()]).item())
        optimizer.step()
        losses.append(loss.item())

    loss = sum(losses[-20:]) / 20
    verdict(
        loss < losses[0] / 10 and grad_norms[-1] < grad_norms[10],
        first_loss=losses[0], loss=loss, early_grad_norm=grad_norms[10], last_grad_norm=grad_norms[-1],
    )  # fmt: skip


if __name__ == "__main__":
    main()
