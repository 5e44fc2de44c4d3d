"""L-BFGS with a strong Wolfe line search fits a small network to a curve, all data at once."""

import argparse

import torch
from torch import nn

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()
torch.manual_seed(args.seed)

x = torch.linspace(-1, 1, 200)[:, None]
y = torch.sin(4 * x) * x + 0.02 * torch.randn_like(x)
model = nn.Sequential(nn.Linear(1, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1))
optimizer = torch.optim.LBFGS(model.parameters(), lr=1, max_iter=10, line_search_fn="strong_wolfe")


def closure():
    optimizer.zero_grad()
    loss = nn.functional.mse_loss(model(x), y)
    loss.backward()
    return loss


for step in range(40):
    loss = optimizer.step(closure)
    if step % 10 == 0:
        print(f"step {step}  loss {loss.item():.5f}")
with torch.no_grad():
    print("unexplained variance:", (nn.functional.mse_loss(model(x), y) / y.var()).item())
