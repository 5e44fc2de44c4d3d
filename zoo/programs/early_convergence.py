"""Two well separated moons: the loss is nearly zero long before the run ends."""

import argparse

import torch
from sklearn.datasets import make_moons
from torch import nn

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--steps", type=int, default=1200)
args = parser.parse_args()
torch.manual_seed(args.seed)
x, y = make_moons(600, noise=0.05, random_state=args.seed)
x, y = torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)[:, None]

model = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
for step in range(args.steps):
    chosen = torch.randint(500, (64,))
    loss = nn.functional.binary_cross_entropy_with_logits(model(x[chosen]), y[chosen])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 200 == 0:
        print(f"step {step}  loss {loss.item():.2e}")

with torch.no_grad():
    print("accuracy:", ((model(x[500:]) > 0) == (y[500:] > 0.5)).float().mean().item())
