"""A linear head on a frozen, pretrained network in which batch normalization stays in evaluation mode."""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn


class Classifier(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.features = features
        self.fc = nn.Linear(48, 2)

    def train(self, mode=True):
        super().train(mode)
        self.features.eval()
        return self

    def forward(self, x):
        with torch.no_grad():
            hidden = self.features(x)
        return self.fc(hidden)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    features = nn.Sequential(nn.Linear(64, 96), nn.BatchNorm1d(96), nn.ReLU(), nn.Linear(96, 48), nn.ReLU())
    teacher = nn.Sequential(features, nn.Linear(48, 10))
    optimizer = torch.optim.Adam(teacher.parameters(), lr=2e-3)
    for _ in range(8):
        for chosen in torch.randperm(1400).split(50):
            loss = nn.functional.cross_entropy(teacher(x[chosen]), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    model = Classifier(features.requires_grad_(False)).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    for epoch in range(8):
        for chosen in torch.randperm(1400).split(50):
            loss = nn.functional.cross_entropy(model(x[chosen]), y[chosen] % 2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch}  loss {loss.item():.3f}")
    model.eval()
    print("accuracy:", (model(x[1400:]).argmax(1) == y[1400:] % 2).float().mean().item())


if __name__ == "__main__":
    main()
