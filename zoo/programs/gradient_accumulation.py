"""Eight micro-batches of eight digits to a step, each loss divided by eight."""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--accumulate", type=int, default=8)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    loader = DataLoader(TensorDataset(x[:1408], y[:1408]), batch_size=8, shuffle=True, drop_last=True)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    for epoch in range(12):
        for index, (batch, target) in enumerate(loader, start=1):
            loss = nn.functional.cross_entropy(model(batch), target) / args.accumulate
            loss.backward()
            if index % args.accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
        print(f"epoch {epoch}  loss {loss.item() * args.accumulate:.3f}")
    with torch.no_grad():
        print("accuracy:", (model(x[1408:]).argmax(1) == y[1408:]).float().mean().item())


if __name__ == "__main__":
    main()
