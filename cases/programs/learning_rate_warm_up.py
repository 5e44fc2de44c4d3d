"""A pre-norm transformer under a linear warm-up of 100 steps.

Scary     A slow and noisy start, in which hardly anything is learned.
Healthy   The warm-up works: the run ends at an accuracy of 0.98 or more.
"""

import torch
from _command import arguments, verdict
from _datasets import minibatches
from torch import nn
from torch.nn import functional as F

ACCEPTED = ()


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.feedforward = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x):
        normed = self.norm1(x)
        x = x + self.attention(normed, normed, normed, need_weights=False)[0]
        return x + self.feedforward(self.norm2(x))


class Transformer(nn.Module):
    def __init__(self, vocabulary=10, width=32, depth=4, length=8, classes=4):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.randn(length, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, tokens):
        return self.head(self.norm(self.blocks(self.embedding(tokens) + self.positions))[:, 0])


def main():
    args = arguments(__doc__, pair=False)
    torch.manual_seed(args.seed)
    tokens = torch.randint(2, 10, (512, 8), generator=torch.Generator().manual_seed(0))
    y = tokens[:, 3] % 4
    model = Transformer()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 100))

    losses = []
    for inputs, labels in minibatches(tokens, y, steps=300):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())

    accuracy = (model(tokens).argmax(1) == y).float().mean().item()
    verdict(
        accuracy >= 0.98, word="healthy",
        first_loss=losses[0], early_loss=sum(losses[40:60]) / 20, loss=sum(losses[-20:]) / 20, accuracy=accuracy,
    )  # fmt: skip


if __name__ == "__main__":
    main()
