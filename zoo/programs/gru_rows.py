"""A GRU reads each digit row by row, eight steps of eight pixels, and names it at the end."""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn


class RowReader(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(8, 64)
        self.classifier = nn.Linear(64, 10)

    def forward(self, images):
        _, last = self.gru(images.transpose(0, 1))
        return self.classifier(last.squeeze(0))


def run_epoch(model, images, labels, optimizer=None):
    correct = 0
    for chosen in torch.randperm(len(images)).split(32):
        scores = model(images[chosen])
        if optimizer is not None:
            optimizer.zero_grad()
            nn.functional.cross_entropy(scores, labels[chosen]).backward()
            optimizer.step()
        correct += (scores.argmax(1) == labels[chosen]).sum().item()
    return correct / len(images)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    model = RowReader()
    optimizer = torch.optim.RMSprop(model.parameters(), lr=2e-3)
    for epoch in range(16):
        train_accuracy = run_epoch(model, images[:1400], labels[:1400], optimizer)
        with torch.no_grad():
            test_accuracy = run_epoch(model, images[1400:], labels[1400:])
        print(f"epoch {epoch}  train {train_accuracy:.3f}  test {test_accuracy:.3f}")
    print("accuracy:", test_accuracy)
