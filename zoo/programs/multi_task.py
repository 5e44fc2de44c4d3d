"""One trunk, three tasks on handwritten digits: the digit, its parity and how much ink it takes."""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn


class MultiTask(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
        self.digit = nn.Linear(32, 10)
        self.parity = nn.Linear(32, 1)
        self.ink = nn.Linear(32, 1)

    def forward(self, x):
        features = self.trunk(x)
        return self.digit(features), self.parity(features).squeeze(1), self.ink(features).squeeze(1)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    ink = x.mean(1)
    ink = (ink - ink.mean()) / ink.std()
    model = MultiTask()
    heads = [*model.digit.parameters(), *model.parity.parameters(), *model.ink.parameters()]
    optimizer = torch.optim.Adam(
        [{"params": model.trunk.parameters(), "lr": 1e-3}, {"params": heads, "lr": 3e-3}], weight_decay=1e-4
    )
    for epoch in range(15):
        for chosen in torch.randperm(1400).split(40):
            digit, parity, amount = model(x[chosen])
            loss = (
                F.cross_entropy(digit, y[chosen])
                + 0.5 * F.binary_cross_entropy_with_logits(parity, (y[chosen] % 2).float())
                + 0.5 * F.mse_loss(amount, ink[chosen])
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch}  loss {loss.item():.3f}")
    with torch.no_grad():
        print("accuracy:", (model(x[1400:])[0].argmax(1) == y[1400:]).float().mean().item())


if __name__ == "__main__":
    main()
