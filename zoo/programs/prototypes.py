"""Clusters as trainable centers: each point pulls softly on the centers near it (fuzzy k-means by gradients)."""

import argparse

import torch
from sklearn.datasets import load_iris
from sklearn.metrics import adjusted_rand_score
from torch import nn

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()
torch.manual_seed(args.seed)

x, y = load_iris(return_X_y=True)
x = torch.tensor(x, dtype=torch.float32)
x = (x - x.mean(0)) / x.std(0)

# k-means++: each further center is a point far from those before it.
rows = [int(torch.randint(len(x), ()))]
for _ in range(2):
    rows.append(int((torch.cdist(x, x[rows]).min(1).values ** 2).multinomial(1)))
centers = nn.Parameter(x[rows].clone())
optimizer = torch.optim.Adam([centers], lr=0.02)
for step in range(400):
    batch = x[torch.randint(len(x), (50,))]
    distance = torch.cdist(batch, centers) ** 2
    loss = -(torch.logsumexp(-distance / 0.5, 1) * 0.5).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 80 == 0:
        print(f"step {step}  loss {loss.item():.3f}")

with torch.no_grad():
    assigned = torch.cdist(x, centers).argmin(1)
print("adjusted Rand index:", adjusted_rand_score(y, assigned))
