"""Twelve hidden layers with batch normalization on handwritten digits: SGD with momentum."""

import argparse
from itertools import pairwise

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class DeepNetwork(nn.Module):
    def __init__(self, depth=12, width=64):
        super().__init__()
        sizes = [64] + [width] * depth
        self.linears = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in pairwise(sizes))
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(depth))
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        for linear, norm in zip(self.linears, self.norms, strict=True):
            x = torch.relu(norm(linear(x)))
        return self.head(x)


def evaluate(model, x, y):
    model.eval()
    with torch.no_grad():
        accuracy = (model(x).argmax(1) == y).float().mean().item()
    model.train()
    return accuracy


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32) / 16 - 0.5
    y = torch.tensor(labels)
    loader = DataLoader(TensorDataset(x[:1437], y[:1437]), batch_size=64, shuffle=True, drop_last=True)
    model = DeepNetwork()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(12):
        for batch, target in loader:
            loss = nn.functional.cross_entropy(model(batch), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch}  loss {loss.item():.3f}  accuracy {evaluate(model, x[1437:], y[1437:]):.3f}")
    print("accuracy:", evaluate(model, x[1437:], y[1437:]))


if __name__ == "__main__":
    main()
