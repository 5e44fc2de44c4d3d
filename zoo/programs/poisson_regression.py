"""Counts that depend on the logarithm of their rate: a generalized linear model with one hidden layer."""

import argparse

import torch
from torch import nn

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()
torch.manual_seed(args.seed)

x = torch.randn(3000, 6)
log_rate = 0.8 * x[:, 0] - 0.5 * x[:, 1] + 0.4 * torch.sin(2 * x[:, 2]) + 0.5
y = torch.poisson(log_rate.exp())

model = nn.Sequential(nn.Linear(6, 32), nn.Softplus(), nn.Linear(32, 1))
criterion = nn.PoissonNLLLoss(log_input=True)
optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
for epoch in range(12):
    for chosen in torch.randperm(2500).split(64):
        prediction = model(x[chosen]).squeeze(1)
        loss = criterion(prediction, y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch}  loss {loss.item():.3f}")

with torch.no_grad():
    correlation = torch.corrcoef(torch.stack([model(x[2500:]).squeeze(1), log_rate[2500:]]))[0, 1]
print("correlation with the true log rate:", correlation.item())
