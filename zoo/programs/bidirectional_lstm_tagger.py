"""Tags every symbol of a sequence with whether it was seen before and whether it comes again: packed, bidirectional."""

import argparse

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

SYMBOLS, PADDING, IGNORED = 12, 0, -100


def make_batch(count):
    lengths = torch.randint(5, 13, (count,)).sort(descending=True).values
    tokens = torch.randint(1, SYMBOLS + 1, (count, int(lengths.max())))
    same = tokens[:, :, None] == tokens[:, None, :]
    valid = torch.arange(tokens.shape[1]) < lengths[:, None]
    same &= valid[:, None, :] & valid[:, :, None]
    before = same.tril(-1).any(2)
    after = same.triu(1).any(2)
    tags = before.long() + 2 * after.long()
    return tokens.masked_fill(~valid, PADDING), tags.masked_fill(~valid, IGNORED), lengths


class Tagger(nn.Module):
    def __init__(self, embedding_dim=24, hidden=48, tags=4):
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS + 1, embedding_dim, padding_idx=PADDING)
        self.lstm = nn.LSTM(embedding_dim, hidden, bidirectional=True, batch_first=True)
        self.out = nn.Linear(2 * hidden, tags)

    def forward(self, tokens, lengths):
        packed = pack_padded_sequence(self.embedding(tokens), lengths, batch_first=True)
        hidden, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        return self.out(hidden)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model = Tagger()
    optimizer = torch.optim.Adam(model.parameters(), lr=8e-3)
    for step in range(500):
        tokens, tags, lengths = make_batch(48)
        scores = model(tokens, lengths)
        loss = nn.functional.cross_entropy(scores.transpose(1, 2), tags, ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step}  loss {loss.item():.3f}")
    tokens, tags, lengths = make_batch(400)
    with torch.no_grad():
        predicted = model(tokens, lengths).argmax(2)
    real = tags != IGNORED
    print("accuracy:", (predicted[real] == tags[real]).float().mean().item())


if __name__ == "__main__":
    main()
