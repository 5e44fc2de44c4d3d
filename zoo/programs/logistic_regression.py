"""Logistic regression in double precision with an L1 penalty in the loss, weights from zero, all data at once."""

import argparse

import torch
from sklearn.datasets import load_breast_cancer
from torch import nn

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()
torch.manual_seed(args.seed)

x, y = load_breast_cancer(return_X_y=True)
x = torch.tensor(x, dtype=torch.float64)
x = (x - x.mean(0)) / x.std(0)
y = torch.tensor(y, dtype=torch.float64)[:, None]
order = torch.randperm(len(x))
x, y = x[order], y[order]

model = nn.Linear(30, 1, dtype=torch.float64)
nn.init.zeros_(model.weight)
nn.init.zeros_(model.bias)
optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
for step in range(400):
    probability = torch.sigmoid(model(x[:450]))
    loss = nn.functional.binary_cross_entropy(probability, y[:450]) + 1e-3 * model.weight.abs().sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 80 == 0:
        print(f"step {step}  loss {loss.item():.4f}")
with torch.no_grad():
    print("accuracy:", ((model(x[450:]) > 0) == (y[450:] > 0.5)).double().mean().item())
