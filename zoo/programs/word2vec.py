"""Word vectors by negative sampling (Mikolov et al.) from Python's documentation."""

import argparse
import collections
import pydoc_data.topics
import re

import torch
import torch.nn.functional as F
from torch import nn


class SkipGram(nn.Module):
    def __init__(self, vocabulary, dim=32):
        super().__init__()
        self.center = nn.Embedding(vocabulary, dim)
        self.context = nn.Embedding(vocabulary, dim)
        nn.init.uniform_(self.center.weight, -0.5 / dim, 0.5 / dim)
        nn.init.zeros_(self.context.weight)

    def forward(self, center, context):
        return (self.center(center).unsqueeze(1) * self.context(context)).sum(2)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    topics = pydoc_data.topics.topics
    words = re.findall(r"[a-z]+", " ".join(topics[name] for name in sorted(topics)).lower())[:40_000]
    kept = [word for word, count in collections.Counter(words).most_common(800)]
    index = {word: position for position, word in enumerate(kept)}
    tokens = torch.tensor([index[word] for word in words if word in index])
    frequency = torch.bincount(tokens, minlength=len(kept)).float() ** 0.75
    model = SkipGram(len(kept))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(500):
        position = torch.randint(3, len(tokens) - 3, (256,))
        offset = torch.randint(1, 4, (256,)) * (2 * torch.randint(2, (256,)) - 1)
        negative = frequency.multinomial(256 * 5, replacement=True).view(256, 5)
        logits = model(tokens[position], torch.cat([tokens[position + offset][:, None], negative], 1))
        loss = -F.logsigmoid(logits[:, 0]).mean() - F.logsigmoid(-logits[:, 1:]).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step}  loss {loss.item():.3f}")
    with torch.no_grad():
        position = torch.randint(3, len(tokens) - 3, (4000,))
        near = model(tokens[position], tokens[position + 1][:, None])
        far = model(tokens[position], frequency.multinomial(4000, replacement=True)[:, None])
    print("neighbors ranked above strangers:", (near > far).float().mean().item())


if __name__ == "__main__":
    main()
