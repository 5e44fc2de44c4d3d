"""Low-rank adapters (B starts at zero) fit a pretrained, frozen network to digits turned upside down."""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn


class LoRALinear(nn.Module):
    def __init__(self, base, rank=8, alpha=16):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))
        self.scaling = alpha / rank
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)

    def forward(self, x):
        return self.base(x) + self.scaling * (x @ self.lora_A.t() @ self.lora_B.t())


def train(model, optimizer, x, y, epochs):
    for _ in range(epochs):
        for chosen in torch.randperm(len(x)).split(50):
            loss = nn.functional.cross_entropy(model(x[chosen]), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def accuracy(model, x, y):
    with torch.no_grad():
        return (model(x).argmax(1) == y).float().mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    digits = load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32) / 16, torch.tensor(digits.target)
    turned = x.flip(1).flatten(1)
    x = x.flatten(1)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 10))
    train(model, torch.optim.Adam(model.parameters(), lr=2e-3), x[:1400], y[:1400], 8)
    print(
        "pretrained:",
        accuracy(model, x[1400:], y[1400:]),
        "on turned digits:",
        accuracy(model, turned[1400:], y[1400:]),
    )
    for index in (0, 2, 4):
        model[index] = LoRALinear(model[index])
    adapters = [p for p in model.parameters() if p.requires_grad]
    train(model, torch.optim.AdamW(adapters, lr=2e-3), turned[:1400], y[:1400], 12)
    print("accuracy:", accuracy(model, turned[1400:], y[1400:]))


if __name__ == "__main__":
    main()
