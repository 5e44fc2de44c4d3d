"""A two-layer post-norm transformer encoder, trained with warm-up, that sorts sequences of numbers."""

import argparse

import torch
from torch import nn


class Sorter(nn.Module):
    def __init__(self, vocabulary=10, length=8, dim=64):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, dim)
        self.positions = nn.Parameter(0.02 * torch.randn(length, dim))
        layer = nn.TransformerEncoderLayer(dim, nhead=4, dim_feedforward=128, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2)
        self.out = nn.Linear(dim, vocabulary)

    def forward(self, x):
        return self.out(self.encoder(self.tokens(x) + self.positions))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model = Sorter()
    optimizer = torch.optim.Adam(model.parameters(), lr=1.5e-3, betas=(0.9, 0.98))
    # Inverse square root after 60 steps of warm-up, as in "Attention is all you need".
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 60, (60 / (step + 1)) ** 0.5))
    for step in range(450):
        numbers = torch.randint(10, (64, 8))
        target = numbers.sort(1).values
        loss = nn.functional.cross_entropy(model(numbers).transpose(1, 2), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 90 == 0:
            print(f"step {step}  loss {loss.item():.3f}")
    model.eval()
    with torch.no_grad():
        numbers = torch.randint(10, (500, 8))
        print("accuracy:", (model(numbers).argmax(2) == numbers.sort(1).values).float().mean().item())
