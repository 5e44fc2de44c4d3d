"""Prices from categories and measurements: an embedding per category beside standardized columns."""

import argparse

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

SIZES = (30, 12, 5)


class TabularModel(nn.Module):
    def __init__(self, continuous):
        super().__init__()
        dims = [min(16, (size + 1) // 2) for size in SIZES]
        self.embeddings = nn.ModuleList(nn.Embedding(size, dim) for size, dim in zip(SIZES, dims, strict=True))
        self.dropout = nn.Dropout(0.05)
        self.layers = nn.Sequential(
            nn.Linear(sum(dims) + continuous, 64), nn.ReLU(), nn.BatchNorm1d(64),
            nn.Linear(64, 32), nn.ReLU(), nn.BatchNorm1d(32), nn.Linear(32, 1),
        )  # fmt: skip

    def forward(self, categories, columns):
        embedded = [table(categories[:, index]) for index, table in enumerate(self.embeddings)]
        return self.layers(torch.cat([self.dropout(torch.cat(embedded, 1)), columns], 1)).squeeze(1)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    categories = torch.stack([torch.randint(size, (4000,)) for size in SIZES], 1)
    columns = torch.randn(4000, 5)
    effects = [torch.randn(size) for size in SIZES]
    price = sum(effect[categories[:, index]] for index, effect in enumerate(effects))
    price = price + columns[:, 0] * columns[:, 1] + columns[:, 2].abs() + 0.2 * torch.randn(4000)
    price = (price - price[:3200].mean()) / price[:3200].std()
    loader = DataLoader(TensorDataset(categories[:3200], columns[:3200], price[:3200]), batch_size=64, shuffle=True)
    model = TabularModel(5)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, epochs=8, steps_per_epoch=len(loader))
    for epoch in range(8):
        model.train()
        for batch, values, target in loader:
            loss = nn.functional.mse_loss(model(batch, values), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
        print(f"epoch {epoch}  loss {loss.item():.3f}")
    model.eval()
    with torch.no_grad():
        residual = price[3200:] - model(categories[3200:], columns[3200:])
    print("explained variance:", 1 - residual.var().item() / price[3200:].var().item())


if __name__ == "__main__":
    main()
