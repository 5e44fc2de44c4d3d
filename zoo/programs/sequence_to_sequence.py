"""A GRU encoder and decoder with attention write a sequence backwards; teacher forcing."""

import argparse

import torch
from torch import nn

SYMBOLS, LENGTH, START = 8, 7, 8


class Encoder(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS + 1, dim)
        self.gru = nn.GRU(dim, dim, batch_first=True)

    def forward(self, tokens):
        return self.gru(self.embedding(tokens))


class Decoder(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS + 1, dim)
        self.query = nn.Linear(dim, dim)
        self.cell = nn.GRUCell(2 * dim, dim)
        self.out = nn.Linear(2 * dim, SYMBOLS)

    def forward(self, memory, hidden, targets):
        previous = torch.full_like(targets[:, 0], START)
        logits = []
        for time in range(targets.shape[1]):
            weights = torch.softmax((memory @ self.query(hidden)[:, :, None]).squeeze(2) / hidden.shape[1] ** 0.5, 1)
            context = (weights[:, :, None] * memory).sum(1)
            hidden = self.cell(torch.cat([self.embedding(previous), context], 1), hidden)
            logits.append(self.out(torch.cat([hidden, context], 1)))
            previous = targets[:, time]
        return torch.stack(logits, 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    encoder, decoder = Encoder(64), Decoder(64)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=4e-3)
    for step in range(400):
        tokens = torch.randint(SYMBOLS, (64, LENGTH))
        targets = tokens.flip(1)
        memory, hidden = encoder(tokens)
        loss = nn.functional.cross_entropy(decoder(memory, hidden[0], targets).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([*encoder.parameters(), *decoder.parameters()], 1.0)
        optimizer.step()
        if step % 80 == 0:
            print(f"step {step}  loss {loss.item():.3f}")
    tokens = torch.randint(SYMBOLS, (500, LENGTH))
    with torch.no_grad():
        memory, hidden = encoder(tokens)
        right = decoder(memory, hidden[0], tokens.flip(1)).argmax(2) == tokens.flip(1)
    print("accuracy:", right.float().mean().item())


if __name__ == "__main__":
    main()
