"""A softmax over the single output unit of a binary classifier.

Seen      Rows of ones against rows of zeros, and the accuracy stays at 0.5. Other initializations, activations and
          batch normalization change nothing.
Cause     The softmax of one number is 1 and its derivative 0: no gradient reaches the network.
Fix       A sigmoid on the output.
Source    stackoverflow.com/questions/31880720 (the same in 42800203, 45337371, 45442843, 34311586)
Sure      A: the accepted answer
Repaired  Accuracy of 0.99 or more, and a gradient that is not zero
"""

import torch
from _command import arguments, verdict
from _datasets import minibatches
from torch import nn
from torch.nn import functional as F

ACCEPTED = ("softmax-over-one-unit", "bounded-output")


def main():
    args = arguments(__doc__)
    torch.manual_seed(args.seed)
    x = torch.cat([torch.ones(500, 128), torch.zeros(500, 128)])
    y = torch.cat([torch.ones(500, 1), torch.zeros(500, 1)])
    model = nn.Sequential(
        nn.Linear(128, 50), nn.ReLU(), nn.Dropout(0.2),
        nn.Linear(50, 50), nn.ReLU(), nn.Dropout(0.2),
        nn.Linear(50, 1), nn.Sigmoid() if args.fixed else nn.Softmax(1),
    )  # fmt: skip
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3)

    for inputs, targets in minibatches(x, y, steps=200):
        optimizer.zero_grad()
        loss = F.binary_cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()

    model.eval()
    accuracy = ((model(x) > 0.5).float() == y).float().mean().item()
    grad_norm = nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
    verdict(accuracy >= 0.99 and grad_norm > 0, loss=loss.item(), accuracy=accuracy, grad_norm=grad_norm)


if __name__ == "__main__":
    main()
