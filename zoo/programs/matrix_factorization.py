"""Ratings as products of user and item factors with biases: SGD on embeddings."""

import argparse

import torch
from torch import nn


class Factorization(nn.Module):
    def __init__(self, users, items, rank=6):
        super().__init__()
        self.user, self.item = nn.Embedding(users, rank), nn.Embedding(items, rank)
        self.user_bias, self.item_bias = nn.Embedding(users, 1), nn.Embedding(items, 1)
        for table in (self.user, self.item):
            nn.init.normal_(table.weight, std=0.1)
        for table in (self.user_bias, self.item_bias):
            nn.init.zeros_(table.weight)

    def forward(self, user, item):
        affinity = (self.user(user) * self.item(item)).sum(1)
        return affinity + self.user_bias(user).squeeze(1) + self.item_bias(item).squeeze(1)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    users, items = 150, 100
    truth = torch.randn(users, 3) @ torch.randn(3, items) / 3**0.5 + 0.5 * torch.randn(users, 1)
    user, item = torch.randint(users, (8000,)), torch.randint(items, (8000,))
    rating = truth[user, item] + 0.1 * torch.randn(8000)
    model = Factorization(users, items)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02, weight_decay=1e-5)
    for epoch in range(8):
        for chosen in torch.randperm(7000).split(100):
            loss = nn.functional.mse_loss(model(user[chosen], item[chosen]), rating[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch}  loss {loss.item():.3f}")
    with torch.no_grad():
        residual = rating[7000:] - model(user[7000:], item[7000:])
    print("explained variance:", 1 - residual.var().item() / rating[7000:].var().item())


if __name__ == "__main__":
    main()
