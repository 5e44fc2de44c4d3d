"""Linear regression by gradient descent: disease progression from ten measurements of 442 diabetes patients."""

import argparse

import torch
from sklearn.datasets import load_diabetes
from torch import nn


def standardize(values):
    return (values - values.mean(0)) / values.std(0)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    x, y = (standardize(torch.tensor(values, dtype=torch.float32)) for values in load_diabetes(return_X_y=True))
    model = nn.Linear(10, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    for step in range(args.steps):
        loss = nn.functional.mse_loss(model(x).squeeze(1), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0 or step == args.steps - 1:
            print(f"step {step:5d}  loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
