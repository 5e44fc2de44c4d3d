"""A network writes the weights of another: curves of any frequency from one number that describes them."""

import argparse

import torch
from torch import nn

HIDDEN = 16
SIZES = (HIDDEN, HIDDEN, HIDDEN * HIDDEN, HIDDEN, HIDDEN, 1)


class HyperNetwork(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.heads = nn.ModuleList(nn.Linear(width, size) for size in SIZES)

    def forward(self, task, x):
        features = self.body(task)
        w1, b1, w2, b2, w3, b3 = (head(features) for head in self.heads)
        hidden = torch.tanh(3 * x[:, :, None] * w1[:, None] + b1[:, None])
        hidden = torch.tanh(hidden @ w2.view(-1, HIDDEN, HIDDEN) + b2[:, None])
        return (hidden * w3[:, None]).sum(2) + b3


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model = HyperNetwork()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for step in range(600):
        task, x = 2 * torch.rand(32, 1) - 1, 2 * torch.rand(32, 20) - 1
        loss = nn.functional.mse_loss(model(task, x), torch.sin((2 + task) * 1.5 * x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step}  loss {loss.item():.4f}")
    task, x = 2 * torch.rand(200, 1) - 1, 2 * torch.rand(200, 50) - 1
    y = torch.sin((2 + task) * 1.5 * x)
    with torch.no_grad():
        print("unexplained variance:", (nn.functional.mse_loss(model(task, x), y) / y.var()).item())


if __name__ == "__main__":
    main()
