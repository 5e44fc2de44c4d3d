"""Two positives in a hundred: plain, weighted, or focal binary cross-entropy, or a balanced sampler."""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import make_classification
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler


def plain(logits, y):
    return F.binary_cross_entropy_with_logits(logits, y)


def weighted(logits, y):
    return F.binary_cross_entropy_with_logits(logits, y, pos_weight=torch.tensor(20.0))


def focal(logits, y, gamma=2.0):
    """Lin et al., 2017: easy examples count less."""
    log_probability = -F.binary_cross_entropy_with_logits(logits, y, reduction="none")
    return (-((1 - log_probability.exp()) ** gamma) * log_probability).mean()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["plain", "weighted", "focal", "sampler"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    x, y = make_classification(
        6000, 20, n_informative=6, weights=[0.98], class_sep=1.5, flip_y=0, random_state=args.seed
    )
    x, y = torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)
    x = (x - x[:4500].mean(0)) / x[:4500].std(0)
    dataset = TensorDataset(x[:4500], y[:4500])
    if args.kind == "sampler":
        weights = torch.where(y[:4500] == 1, 49.0, 1.0)
        loader = DataLoader(dataset, batch_size=100, sampler=WeightedRandomSampler(weights, 4500))
    else:
        loader = DataLoader(dataset, batch_size=100, shuffle=True)
    objective = {"weighted": weighted, "focal": focal}.get(args.kind, plain)
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for epoch in range(10):
        for features, target in loader:
            loss = objective(model(features).squeeze(-1), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            area = roc_auc_score(y[4500:], model(x[4500:]).squeeze(-1))
        print(f"epoch {epoch}  loss {loss.item():.4f}  area under the curve {area:.3f}")
    print("area under the curve:", area)


if __name__ == "__main__":
    main()
