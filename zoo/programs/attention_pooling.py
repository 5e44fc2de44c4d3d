"""Attention over a set of instances (multiple-instance learning): which bag holds a seven?"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn


class AttentionPooling(nn.Module):
    def __init__(self, dim=48):
        super().__init__()
        self.features = nn.Sequential(nn.Linear(64, dim), nn.ReLU())
        self.v, self.u, self.w = nn.Linear(dim, 24), nn.Linear(dim, 24), nn.Linear(24, 1)
        self.classifier = nn.Linear(dim, 1)

    def forward(self, bags):
        h = self.features(bags)
        score = self.w(torch.tanh(self.v(h)) * torch.sigmoid(self.u(h)))
        weights = torch.softmax(score, dim=1)
        return self.classifier((weights * h).sum(1)).squeeze(1)


def make_bags(x, y, count, size=6):
    """Bags (count, size, 64); half of them hold one seven, the others none."""
    positive = torch.arange(count) % 2 == 0
    others, sevens = torch.nonzero(y != 7).squeeze(1), torch.nonzero(y == 7).squeeze(1)
    index = others[torch.randint(len(others), (count, size))]
    index[positive, 0] = sevens[torch.randint(len(sevens), (int(positive.sum()),))]
    return x[index], positive.float()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    model = AttentionPooling()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, weight_decay=1e-4)
    for step in range(400):
        bags, labels = make_bags(x[:1400], y[:1400], 32)
        loss = nn.functional.binary_cross_entropy_with_logits(model(bags), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 80 == 0:
            print(f"step {step}  loss {loss.item():.3f}")
    bags, labels = make_bags(x[1400:], y[1400:], 600)
    with torch.no_grad():
        print("accuracy:", ((model(bags) > 0) == (labels > 0.5)).float().mean().item())


if __name__ == "__main__":
    main()
