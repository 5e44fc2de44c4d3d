"""A two-layer network: benign or malignant, from thirty measurements of 569 breast tumors."""

import argparse

import torch
from sklearn.datasets import load_breast_cancer
from torch import nn


class TwoLayerNetwork(nn.Module):
    def __init__(self, features, hidden):
        super().__init__()
        self.hidden = nn.Linear(features, hidden)
        self.output = nn.Linear(hidden, 1)

    def forward(self, x):
        return self.output(torch.tanh(self.hidden(x))).squeeze(1)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    x, y = (torch.tensor(values, dtype=torch.float32) for values in load_breast_cancer(return_X_y=True))
    x = (x - x.mean(0)) / x.std(0)
    model = TwoLayerNetwork(features=30, hidden=16)
    loss_function = nn.BCEWithLogitsLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    for step in range(args.steps):
        batch = torch.randint(len(x), (64,))
        loss = loss_function(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0 or step == args.steps - 1:
            print(f"step {step:5d}  loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
