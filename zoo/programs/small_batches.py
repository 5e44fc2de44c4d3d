"""Digits in very small batches: one, two or four examples at a time, with layer normalization and SGD."""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--batch-size", type=int, default=4)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()
torch.manual_seed(args.seed)

digits = load_digits()
x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01 * args.batch_size**0.5)
loss_fn = nn.CrossEntropyLoss()

for step, chosen in enumerate(torch.randperm(1400).repeat(3)[: 1200 * args.batch_size].split(args.batch_size)):
    loss = loss_fn(model(x[chosen]), y[chosen])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 200 == 0:
        print(f"step {step}  loss {loss.item():.3f}")

with torch.no_grad():
    print("accuracy:", (model(x[1400:]).argmax(1) == y[1400:]).float().mean().item())
