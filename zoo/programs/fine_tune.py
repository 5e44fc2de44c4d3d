"""Pretrains on digits 0 to 4, freezes the body, trains a new head on 5 to 9, then unfreezes at a small rate."""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn


def fit(model, optimizer, x, y, epochs):
    for _ in range(epochs):
        for chosen in torch.randperm(len(x)).split(32):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x[chosen]), y[chosen])
            loss.backward()
            optimizer.step()
    return loss.item()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    digits = load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
    low, high = y[:1400] < 5, y[:1400] >= 5
    body = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 16, 64), nn.ReLU(),
    )  # fmt: skip
    model = nn.Sequential(body, nn.Linear(64, 5))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    print("pretraining loss", fit(model, optimizer, x[:1400][low], y[:1400][low], 6))

    for parameter in body.parameters():
        parameter.requires_grad = False
    model[1] = nn.Linear(64, 5)
    optimizer = torch.optim.Adam(model[1].parameters(), lr=3e-3)
    print("head only loss", fit(model, optimizer, x[:1400][high], y[:1400][high] - 5, 6))

    for parameter in body.parameters():
        parameter.requires_grad = True
    optimizer = torch.optim.Adam(
        [{"params": body.parameters(), "lr": 1e-4}, {"params": model[1].parameters()}], lr=1e-3
    )
    print("fine-tuning loss", fit(model, optimizer, x[:1400][high], y[:1400][high] - 5, 5))
    held_out = y[1400:] >= 5
    with torch.no_grad():
        correct = model(x[1400:][held_out]).argmax(1) == y[1400:][held_out] - 5
    print("accuracy:", correct.float().mean().item())


if __name__ == "__main__":
    main()
