"""Disease progression from ten standardized measurements: squared error, Huber, quantiles or a Gaussian likelihood."""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_diabetes
from torch import nn

QUANTILES = torch.tensor([0.1, 0.5, 0.9])


def squared(output, y):
    return F.mse_loss(output[:, 0], y)


def huber(output, y):
    return F.huber_loss(output[:, 0], y, delta=0.5)


def pinball(output, y):
    error = y[:, None] - output
    return torch.maximum(QUANTILES * error, (QUANTILES - 1) * error).mean()


def gaussian(output, y):
    return F.gaussian_nll_loss(output[:, 0], y, F.softplus(output[:, 1]) + 1e-3)


LOSSES = {"squared": (squared, 1, 0), "huber": (huber, 1, 0), "quantile": (pinball, 3, 1), "gaussian": (gaussian, 2, 0)}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("loss", choices=LOSSES)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    x, y = (torch.tensor(part, dtype=torch.float32) for part in load_diabetes(return_X_y=True))
    order = torch.randperm(len(x))
    x, y = x[order] / x.std(0), y[order]
    mean, std = y[:342].mean(), y[:342].std()
    y = (y - mean) / std
    objective, outputs, center = LOSSES[args.loss]
    model = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, outputs))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    for epoch in range(40):
        for chosen in torch.randperm(342).split(32):
            optimizer.zero_grad()
            loss = objective(model(x[chosen]), y[chosen])
            loss.backward()
            optimizer.step()
        if epoch % 10 == 9:
            with torch.no_grad():
                print(f"epoch {epoch + 1}  held-out loss {objective(model(x[342:]), y[342:]).item():.3f}")
    with torch.no_grad():
        residual = y[342:] - model(x[342:])[:, center]
    print("explained variance:", 1 - residual.var().item() / y[342:].var().item())


if __name__ == "__main__":
    main()
