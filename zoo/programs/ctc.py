"""Connectionist temporal classification: read a word from noisy frames in which letters last for a random time."""

import argparse

import torch
from torch import nn

LETTERS, BLANK = 6, 0


def make_batch(count, prototypes):
    """Frames (time, count, features), words one after the other, lengths of frames and words."""
    words, frames = [], []
    for _ in range(count):
        word = torch.randint(1, LETTERS + 1, (int(torch.randint(2, 5, ())),))
        lengths = torch.randint(2, 5, (len(word),))
        frames.append(prototypes[word.repeat_interleave(lengths)])
        words.append(word)
    sizes = torch.tensor([len(frame) for frame in frames])
    padded = nn.utils.rnn.pad_sequence(frames)
    return padded + 0.3 * torch.randn_like(padded), torch.cat(words), sizes, torch.tensor([len(w) for w in words])


class Reader(nn.Module):
    def __init__(self, features, hidden=48):
        super().__init__()
        self.lstm = nn.LSTM(features, hidden, bidirectional=True)
        self.out = nn.Linear(2 * hidden, LETTERS + 1)

    def forward(self, frames):
        return self.out(self.lstm(frames)[0]).log_softmax(2)


def decode(log_probability, size):
    best = log_probability[:size].argmax(1).unique_consecutive()
    return best[best != BLANK]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    prototypes = torch.randn(LETTERS + 1, 10)
    model, ctc = Reader(10), nn.CTCLoss(blank=BLANK)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(250):
        frames, words, frame_sizes, word_sizes = make_batch(24, prototypes)
        loss = ctc(model(frames), words, frame_sizes, word_sizes)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}  loss {loss.item():.3f}")
    frames, words, frame_sizes, word_sizes = make_batch(200, prototypes)
    with torch.no_grad():
        found = model(frames)
    right = [
        decode(found[:, row], size).tolist() == word.tolist()
        for row, (size, word) in enumerate(zip(frame_sizes, words.split(word_sizes.tolist()), strict=True))
    ]
    print("words read right:", sum(right) / len(right))


if __name__ == "__main__":
    main()
