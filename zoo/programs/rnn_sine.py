"""A plain tanh RNN that continues sine waves of random frequency and phase."""

import argparse
import math

import torch
from torch import nn


def waves(count, length=26):
    frequency = 0.1 + 0.25 * torch.rand(count, 1)
    phase = 2 * math.pi * torch.rand(count, 1)
    return torch.sin(2 * math.pi * frequency * torch.arange(length) + phase).unsqueeze(-1)


class Forecaster(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.RNN(1, 48, batch_first=True)
        self.readout = nn.Linear(48, 1)

    def forward(self, x):
        hidden, _ = self.rnn(x)
        return self.readout(hidden)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model = Forecaster()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    criterion = nn.MSELoss()
    for step in range(400):
        batch = waves(64)
        loss = criterion(model(batch[:, :-1]), batch[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step}  loss {loss.item():.4f}")
    batch = waves(500)
    with torch.no_grad():
        print("mean squared error:", criterion(model(batch[:, :-1])[:, 8:], batch[:, 9:]).item())
