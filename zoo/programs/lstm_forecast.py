"""A two-layer LSTM forecasts a noisy seasonal series one step ahead from windows of 24 points."""

import argparse
import math

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Model(nn.Module):
    def __init__(self, hidden=32):
        super().__init__()
        self.lstm = nn.LSTM(1, hidden, num_layers=2, batch_first=True, dropout=0.1)
        self.linear = nn.Linear(hidden, 1)

    def forward(self, x):
        out, (_, _) = self.lstm(x)
        return self.linear(out[:, -1])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    time = torch.arange(1500.0)
    series = torch.sin(2 * math.pi * time / 24) + 0.5 * torch.sin(2 * math.pi * time / 7) + 0.1 * torch.randn(1500)
    series = (series - series[:1200].mean()) / series[:1200].std()
    windows = series.unfold(0, 25, 1)
    x, y = windows[:, :24, None], windows[:, 24:]
    loader = DataLoader(TensorDataset(x[:1170], y[:1170]), batch_size=64, shuffle=True)
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for epoch in range(12):
        model.train()
        total = 0.0
        for batch, target in loader:
            loss = nn.functional.mse_loss(model(batch), target)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total += loss.item() * len(batch)
        print(f"epoch {epoch}  loss {total / 1170:.4f}")
    model.eval()
    with torch.no_grad():
        residual = y[1200:] - model(x[1200:])
    print("explained variance:", 1 - residual.var().item() / y[1200:].var().item())


if __name__ == "__main__":
    main()
