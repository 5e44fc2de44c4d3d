"""XOR with a mean absolute error, sigmoids and small steps.

Seen      The loss stays near 0.5 and all outputs near 0.5.
Cause     The gradient of the absolute error has a constant size, the sigmoid's slope is at most 0.25, and the steps are
          too few and too small.
Fix       Mean squared error and Adam.
Source    stackoverflow.com/questions/31556268
Sure      A: the accepted answer
Repaired  Accuracy 1, and outputs that spread over more than 0.9
"""

import torch
from _command import arguments, verdict
from torch import nn
from torch.nn import functional as F

ACCEPTED = ("learning-rate-too-low", "saturating-activations", "flat-loss", "undertrained")


def main():
    args = arguments(__doc__)
    torch.manual_seed(args.seed)
    x = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    y = torch.tensor([[0.0], [1.0], [0.0], [1.0]])
    model = nn.Sequential(nn.Linear(2, 4), nn.Sigmoid(), nn.Linear(4, 1), nn.Sigmoid())
    layers = [model[0], model[2]]
    for layer in layers:
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    if args.fixed:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.11, nesterov=True)
    criterion = F.mse_loss if args.fixed else F.l1_loss

    for _ in range(1000):
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()

    outputs = model(x)
    accuracy = ((outputs > 0.5).float() == y).float().mean().item()
    spread = (outputs.max() - outputs.min()).item()
    verdict(accuracy == 1 and spread > 0.9, loss=loss.item(), accuracy=accuracy, spread=spread)


if __name__ == "__main__":
    main()
