"""Several tags per example: one sigmoid per tag with binary cross-entropy on logits."""

import argparse

import torch
from sklearn.datasets import make_multilabel_classification
from sklearn.metrics import f1_score
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class TagModel(nn.Module):
    def __init__(self, features, tags):
        super().__init__()
        self.norm = nn.BatchNorm1d(features)
        self.hidden = nn.Linear(features, 64)
        self.out = nn.Linear(64, tags)

    def forward(self, x):
        return self.out(nn.functional.relu(self.hidden(self.norm(x))))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    x, y = make_multilabel_classification(2000, n_features=30, n_classes=8, n_labels=3, random_state=args.seed)
    x, y = torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)
    loader = DataLoader(TensorDataset(x[:1600], y[:1600]), batch_size=32, shuffle=True)
    model = TagModel(30, 8)
    criterion = nn.BCEWithLogitsLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for epoch in range(10):
        model.train()
        for features, tags in loader:
            optimizer.zero_grad()
            loss = criterion(model(features), tags)
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch}  loss {loss.item():.3f}")
    model.eval()
    with torch.no_grad():
        predicted = (model(x[1600:]) > 0).int()
    print("micro F1:", f1_score(y[1600:], predicted, average="micro"))


if __name__ == "__main__":
    main()
