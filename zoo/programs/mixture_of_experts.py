"""Four experts and a top-two gate with a load-balancing loss fit a function made of pieces."""

import argparse

import torch
from torch import nn


class MixtureOfExperts(nn.Module):
    def __init__(self, inputs, hidden=32, experts=4, chosen=2):
        super().__init__()
        self.gate = nn.Linear(inputs, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, 1)) for _ in range(experts)
        )
        self.chosen = chosen

    def forward(self, x):
        probability = self.gate(x).softmax(1)
        best, index = probability.topk(self.chosen, dim=1)
        weights = torch.zeros_like(probability).scatter(1, index, best / best.sum(1, keepdim=True))
        outputs = torch.cat([expert(x) for expert in self.experts], 1)
        share = (weights > 0).float().mean(0)
        balance = len(self.experts) * (share * probability.mean(0)).sum() / self.chosen
        return (weights * outputs).sum(1), balance


def target(x):
    return torch.where(x[:, 0] > 0, torch.sin(3 * x[:, 1]), x[:, 1] ** 2 - 1) + 0.5 * torch.sign(x[:, 2])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model = MixtureOfExperts(3)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(600):
        x = torch.randn(128, 3)
        prediction, balance = model(x)
        loss = nn.functional.mse_loss(prediction, target(x)) + 0.01 * balance
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step}  loss {loss.item():.3f}")
    x = torch.randn(2000, 3)
    with torch.no_grad():
        residual = target(x) - model(x)[0]
    print("explained variance:", 1 - residual.var().item() / target(x).var().item())


if __name__ == "__main__":
    main()
