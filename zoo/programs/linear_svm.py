"""A linear support vector machine by sub-gradients: hinge loss plus an L2 penalty, labels -1 and 1."""

import argparse

import torch
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import StandardScaler

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()
torch.manual_seed(args.seed)

x, y = load_breast_cancer(return_X_y=True)
x = torch.tensor(StandardScaler().fit_transform(x), dtype=torch.float32)
y = 2.0 * torch.tensor(y, dtype=torch.float32) - 1
order = torch.randperm(len(x))
x, y = x[order], y[order]
w = torch.zeros(30, requires_grad=True)
b = torch.zeros(1, requires_grad=True)
optimizer = torch.optim.SGD([w, b], lr=0.02)
for step in range(600):
    chosen = torch.randint(450, (32,))
    margin = y[chosen] * (x[chosen] @ w + b)
    loss = (1 - margin).clamp(min=0).mean() + 1e-3 * w.square().sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 100 == 0:
        print(f"step {step}  loss {loss.item():.3f}")
print("accuracy:", (y[450:] * (x[450:] @ w + b) > 0).float().mean().item())
