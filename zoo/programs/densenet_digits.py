"""A DenseNet, every layer reading all that came before it, on handwritten digits."""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn


class DenseLayer(nn.Module):
    def __init__(self, channels, growth):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, growth, 3, padding=1, bias=False)

    def forward(self, x):
        return torch.cat([x, self.conv(torch.relu(self.norm(x)))], 1)


def transition(channels):
    return nn.Sequential(
        nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels // 2, 1, bias=False), nn.AvgPool2d(2)
    )


def densenet(growth=6, layers=5):
    channels, modules = 12, [nn.Conv2d(1, 12, 3, padding=1, bias=False)]
    for block in range(2):
        for _ in range(layers):
            modules.append(DenseLayer(channels, growth))
            channels += growth
        if block == 0:
            modules.append(transition(channels))
            channels //= 2
    modules += [nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)]
    return nn.Sequential(*modules)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    y = torch.tensor(digits.target)
    model = densenet()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for epoch in range(6):
        model.train()
        for chosen in torch.randperm(1400).split(64):
            loss = nn.functional.cross_entropy(model(x[chosen]), y[chosen])
            model.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            accuracy = (model(x[1400:]).argmax(1) == y[1400:]).float().mean().item()
        print(f"epoch {epoch}  loss {loss.item():.3f}  accuracy {accuracy:.3f}")
    print("accuracy:", accuracy)


if __name__ == "__main__":
    main()
