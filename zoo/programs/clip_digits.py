"""Images and words in one space (CLIP): digits and their spelled names, a learnable temperature."""

import argparse
import math

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


class CLIP(nn.Module):
    def __init__(self, dim=32):
        super().__init__()
        self.image_encoder = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, dim))
        self.letters = nn.Embedding(27, 32, padding_idx=0)
        self.text_encoder = nn.GRU(32, dim, batch_first=True)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def encode_text(self, tokens):
        return F.normalize(self.text_encoder(self.letters(tokens))[1][0], dim=-1)

    def encode_image(self, images):
        return F.normalize(self.image_encoder(images), dim=-1)


def spell(names):
    return torch.tensor([[ord(letter) - 96 for letter in name] + [0] * (5 - len(name)) for name in names])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    digits = load_digits()
    images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    tokens = spell(NAMES)
    model = CLIP()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    by_class = [torch.nonzero(labels[:1400] == digit).squeeze(1) for digit in range(10)]
    for step in range(300):
        # One image of every class: every other pair of the batch is a true negative.
        chosen = torch.stack([members[torch.randint(len(members), ())] for members in by_class])
        image, text = model.encode_image(images[chosen]), model.encode_text(tokens)
        logits = model.logit_scale.exp() * image @ text.t()
        target = torch.arange(10)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        if step % 60 == 0:
            print(f"step {step}  loss {loss.item():.3f}")
    with torch.no_grad():
        predicted = (model.encode_image(images[1400:]) @ model.encode_text(tokens).t()).argmax(1)
    print("accuracy:", (predicted == labels[1400:]).float().mean().item())


if __name__ == "__main__":
    main()
