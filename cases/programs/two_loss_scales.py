"""Two heads, of which the second has a loss a million times as large and a weight of 1e-6.

Scary     The raw losses differ by six orders of magnitude.
Healthy   The weight makes up for it: both heads learn.
"""

import torch
from _command import arguments, verdict
from torch import nn
from torch.nn import functional as F

ACCEPTED = ()


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(10, 64), nn.ReLU())
        self.scores, self.value = nn.Linear(64, 2), nn.Linear(64, 1)

    def forward(self, x):
        return self.scores(self.body(x)), self.value(self.body(x)) * 100


def main():
    args = arguments(__doc__, pair=False)
    torch.manual_seed(args.seed)
    x = torch.randn(500, 10)
    labels, values = (x[:, 0] > 0).long(), 1000 * x[:, 1:2]
    model = TwoHeads()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    losses = []
    for _ in range(500):
        optimizer.zero_grad()
        scores, found = model(x)
        loss = F.cross_entropy(scores, labels) + 1e-6 * F.mse_loss(found, values)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    accuracy = (model(x)[0].argmax(1) == labels).float().mean().item()
    norms = {"scores_grad": model.scores.weight.grad.norm().item(), "value_grad": model.value.weight.grad.norm().item()}
    verdict(accuracy >= 0.98, word="healthy", first_loss=losses[0], loss=losses[-1], accuracy=accuracy, **norms)


if __name__ == "__main__":
    main()
