"""A character LSTM with tied weights, truncated back-propagation through time and a carried, detached state."""

import argparse
import pydoc_data.topics

import torch
from torch import nn


class CharLSTM(nn.Module):
    def __init__(self, vocabulary, dim=64):
        super().__init__()
        self.encoder = nn.Embedding(vocabulary, dim)
        self.lstm = nn.LSTM(dim, dim)
        self.drop = nn.Dropout(0.1)
        self.decoder = nn.Linear(dim, vocabulary)
        self.decoder.weight = self.encoder.weight
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)

    def forward(self, tokens, state):
        hidden, state = self.lstm(self.drop(self.encoder(tokens)), state)
        return self.decoder(self.drop(hidden)), state


def batchify(text, columns):
    letters = sorted(set(text))
    tokens = torch.tensor([letters.index(letter) for letter in text])
    rows = len(tokens) // columns
    return tokens[: rows * columns].view(columns, rows).t().contiguous(), len(letters)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    text = "".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))[:200_000].lower()
    rows, vocabulary = batchify(text, 32)
    model = CharLSTM(vocabulary)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    state = None
    for step, start in enumerate(range(0, len(rows) - 26, 25)):
        inputs, targets = rows[start : start + 25], rows[start + 1 : start + 26]
        if state is not None:
            state = tuple(part.detach() for part in state)
        logits, state = model(inputs, state)
        loss = nn.functional.cross_entropy(logits.view(-1, vocabulary), targets.reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}  loss {loss.item():.3f}")
    print("loss per character:", loss.item())


if __name__ == "__main__":
    main()
