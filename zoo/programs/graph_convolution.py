"""A two-layer graph convolution finds communities from the labels of a few nodes (Kipf and Welling)."""

import argparse

import torch
from torch import nn


class GraphConvolution(nn.Module):
    def __init__(self, inside, outside):
        super().__init__()
        self.linear = nn.Linear(inside, outside, bias=False)

    def forward(self, x, adjacency):
        return adjacency @ self.linear(x)


class GCN(nn.Module):
    def __init__(self, features, hidden, classes):
        super().__init__()
        self.conv1 = GraphConvolution(features, hidden)
        self.conv2 = GraphConvolution(hidden, classes)

    def forward(self, x, adjacency):
        x = nn.functional.dropout(x, 0.5, self.training)
        x = torch.relu(self.conv1(x, adjacency))
        x = nn.functional.dropout(x, 0.5, self.training)
        return self.conv2(x, adjacency)


def communities(nodes=300, classes=4, inside=0.08, outside=0.01, features=40):
    """A stochastic block model: features, normalized adjacency with self-loops, communities."""
    y = torch.arange(nodes) % classes
    probability = torch.where(y[:, None] == y, inside, outside)
    edges = torch.triu(torch.rand(nodes, nodes) < probability, 1).float()
    adjacency = edges + edges.t() + torch.eye(nodes)
    scale = adjacency.sum(1) ** -0.5
    centers = torch.randn(classes, features)
    return 0.5 * centers[y] + torch.randn(nodes, features), scale[:, None] * adjacency * scale, y


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    x, adjacency, y = communities()
    order = torch.randperm(len(y))
    train, test = order[:60], order[100:]
    model = GCN(x.shape[1], 16, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=5e-4)
    for epoch in range(200):
        model.train()
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x, adjacency)[train], y[train])
        loss.backward()
        optimizer.step()
        if epoch % 50 == 0:
            print(f"epoch {epoch}  loss {loss.item():.3f}")
    model.eval()
    with torch.no_grad():
        print("accuracy:", (model(x, adjacency)[test].argmax(1) == y[test]).float().mean().item())


if __name__ == "__main__":
    main()
