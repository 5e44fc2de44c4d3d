"""Which topic a line of Python's documentation comes from: a bag of hashed words, sparse gradients, two optimizers."""

import argparse
import pydoc_data.topics
import zlib

import torch
from torch import nn

BUCKETS = 5000


def lines_of(names):
    for label, name in enumerate(names):
        for line in pydoc_data.topics.topics[name].splitlines():
            words = line.lower().split()
            if len(words) >= 4:
                yield [zlib.crc32(word.encode()) % BUCKETS for word in words], label


def collate(examples):
    words, labels = zip(*examples, strict=True)
    offsets = torch.tensor([0] + [len(word) for word in words]).cumsum(0)[:-1]
    return torch.tensor([word for line in words for word in line]), offsets, torch.tensor(labels)


class TopicModel(nn.Module):
    def __init__(self, topics, dim=32):
        super().__init__()
        self.embedding = nn.EmbeddingBag(BUCKETS, dim, mode="mean", sparse=True)
        self.linear = nn.Linear(dim, topics)

    def forward(self, words, offsets):
        return self.linear(self.embedding(words, offsets))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    topics = sorted(pydoc_data.topics.topics, key=lambda name: -len(pydoc_data.topics.topics[name]))[:8]
    examples = list(lines_of(topics))
    order = torch.randperm(len(examples)).tolist()
    held_out, training = [examples[i] for i in order[:400]], [examples[i] for i in order[400:]]
    model = TopicModel(len(topics))
    sparse = torch.optim.SparseAdam(model.embedding.parameters(), lr=0.02)
    dense = torch.optim.Adam(model.linear.parameters(), lr=0.01)
    for epoch in range(6):
        for chosen in torch.randperm(len(training)).split(50):
            words, offsets, labels = collate([training[i] for i in chosen])
            sparse.zero_grad()
            dense.zero_grad()
            loss = nn.functional.cross_entropy(model(words, offsets), labels)
            loss.backward()
            sparse.step()
            dense.step()
        print(f"epoch {epoch}  loss {loss.item():.3f}")
    words, offsets, labels = collate(held_out)
    with torch.no_grad():
        print("accuracy:", (model(words, offsets).argmax(1) == labels).float().mean().item())


if __name__ == "__main__":
    main()
