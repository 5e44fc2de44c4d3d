"""Embeddings of digits by comparison: a siamese network with contrastive loss, or triplets with a margin."""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torch import nn


class Embedder(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))

    def forward(self, x):
        return self.net(x)


def contrastive(model, x, y, margin=2.0):
    first, second = torch.randint(len(x), (2, 64))
    # Half of the pairs would almost never share a class by chance: draw those from the class of the first.
    for row in range(0, 64, 2):
        alike = torch.nonzero(y == y[first[row]]).squeeze(1)
        second[row] = alike[torch.randint(len(alike), ())]
    same = (y[first] == y[second]).float()
    distance = F.pairwise_distance(model(x[first]), model(x[second]))
    return (same * distance**2 + (1 - same) * F.relu(margin - distance) ** 2).mean()


def triplets(model, x, y):
    anchor = torch.randint(len(x), (64,))
    weights = (y[anchor][:, None] == y).float()
    positive = weights.multinomial(1).squeeze(1)
    negative = (1 - weights).multinomial(1).squeeze(1)
    return F.triplet_margin_loss(model(x[anchor]), model(x[positive]), model(x[negative]), margin=1.0)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["siamese", "triplet"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    objective = {"siamese": contrastive, "triplet": triplets}[args.kind]
    model = Embedder()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for step in range(400):
        loss = objective(model, x[:1400], y[:1400])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 80 == 0:
            print(f"step {step}  loss {loss.item():.3f}")
    with torch.no_grad():
        embedded = model(x).numpy()
    neighbors = KNeighborsClassifier(5).fit(embedded[:1400], y[:1400])
    print("accuracy of neighbors:", neighbors.score(embedded[1400:], y[1400:]))


if __name__ == "__main__":
    main()
