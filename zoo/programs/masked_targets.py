"""Several laboratory values predicted at once, of which most were never measured: NaN targets left out of the loss."""

import argparse

import torch
from torch import nn

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()
torch.manual_seed(args.seed)

x = torch.randn(3000, 12)
truth = torch.tanh(x @ torch.randn(12, 8) / 12**0.5) @ torch.randn(8, 5)
y = (truth - truth.mean(0)) / truth.std(0) + 0.1 * torch.randn(3000, 5)
y[:2500][torch.rand(2500, 5) < 0.6] = float("nan")

model = nn.Sequential(nn.Linear(12, 64), nn.Tanh(), nn.Linear(64, 5))
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for epoch in range(15):
    for chosen in torch.randperm(2500).split(64):
        prediction, target = model(x[chosen]), y[chosen]
        measured = ~torch.isnan(target)
        loss = nn.functional.mse_loss(prediction[measured], target[measured])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if epoch % 5 == 4:
        print(f"epoch {epoch + 1}  loss {loss.item():.3f}")
with torch.no_grad():
    residual = y[2500:] - model(x[2500:])
print("explained variance:", 1 - (residual.var() / y[2500:].var()).item())
