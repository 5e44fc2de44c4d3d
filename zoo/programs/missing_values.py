"""Tables with holes: missing entries arrive as NaN, the model replaces them by a trainable value and marks them."""

import argparse

import torch
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import StandardScaler
from torch import nn


class ImputingClassifier(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.default = nn.Parameter(torch.zeros(features))
        self.layers = nn.Sequential(nn.Linear(2 * features, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, x):
        missing = torch.isnan(x)
        filled = torch.where(missing, self.default, x)
        return self.layers(torch.cat([filled, missing.float()], 1)).squeeze(1)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    x, y = load_breast_cancer(return_X_y=True)
    x = torch.tensor(StandardScaler().fit_transform(x), dtype=torch.float32)
    y = torch.tensor(y, dtype=torch.float32)
    x[torch.rand_like(x) < 0.2] = float("nan")
    order = torch.randperm(len(x))
    x, y = x[order], y[order]
    model = ImputingClassifier(30)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for epoch in range(20):
        for chosen in torch.randperm(430).split(32):
            loss = nn.functional.binary_cross_entropy_with_logits(model(x[chosen]), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if epoch % 5 == 4:
            print(f"epoch {epoch + 1}  loss {loss.item():.3f}")
    with torch.no_grad():
        print("accuracy:", ((model(x[430:]) > 0) == (y[430:] > 0.5)).float().mean().item())


if __name__ == "__main__":
    main()
