"""Ten SELU layers without any normalization, initialized and dropped out as their authors say (Klambauer et al.)."""

import argparse

import torch
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import StandardScaler
from torch import nn


def network(inputs, depth=10, width=32):
    layers = []
    for index in range(depth):
        linear = nn.Linear(inputs if index == 0 else width, width)
        nn.init.kaiming_normal_(linear.weight, nonlinearity="linear")
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.SELU(), nn.AlphaDropout(0.02)]
    return nn.Sequential(*layers, nn.Linear(width, 2))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    x, y = load_breast_cancer(return_X_y=True)
    x, y = torch.tensor(StandardScaler().fit_transform(x), dtype=torch.float32), torch.tensor(y)
    order = torch.randperm(len(x))
    x, y = x[order], y[order]
    model = network(30)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for epoch in range(15):
        model.train()
        for chosen in torch.randperm(430).split(20):
            loss = nn.functional.cross_entropy(model(x[chosen]), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch}  loss {loss.item():.3f}")
    model.eval()
    with torch.no_grad():
        print("accuracy:", (model(x[430:]).argmax(1) == y[430:]).float().mean().item())


if __name__ == "__main__":
    main()
