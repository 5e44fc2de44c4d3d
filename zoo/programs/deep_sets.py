"""Deep sets: the spread of a set of numbers, whatever their order and count."""

import argparse

import torch
from torch import nn


class DeepSet(nn.Module):
    def __init__(self):
        super().__init__()
        self.phi = nn.Sequential(nn.Linear(1, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU())
        self.rho = nn.Sequential(nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 1))

    def forward(self, x, mask):
        features = self.phi(x[:, :, None]) * mask[:, :, None]
        return self.rho(features.sum(1) / mask.sum(1, keepdim=True)).squeeze(1)


def make_batch(count):
    scale = 0.2 + 1.8 * torch.rand(count, 1)
    x = scale * torch.randn(count, 20) + torch.randn(count, 1)
    mask = (torch.arange(20) < torch.randint(6, 21, (count, 1))).float()
    mean = (x * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
    deviation = (((x - mean) ** 2 * mask).sum(1) / mask.sum(1)).sqrt()
    return x * mask, mask, deviation


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model = DeepSet()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(500):
        x, mask, deviation = make_batch(64)
        loss = nn.functional.mse_loss(model(x, mask), deviation)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step}  loss {loss.item():.4f}")
    x, mask, deviation = make_batch(1000)
    with torch.no_grad():
        residual = deviation - model(x, mask)
    print("explained variance:", 1 - residual.var().item() / deviation.var().item())


if __name__ == "__main__":
    main()
