"""Contrastive learning (SimCLR) on shifted and noisy digits, judged by a linear probe on the frozen features."""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import nn


def augment(images):
    shift = torch.randint(-1, 2, (2,)).tolist()
    return torch.roll(images, shift, (2, 3)) * (0.7 + 0.6 * torch.rand(len(images), 1, 1, 1)) + 0.1 * torch.randn_like(
        images
    )


def nt_xent(first, second, temperature=0.5):
    z = F.normalize(torch.cat([first, second]), dim=1)
    similarity = z @ z.t() / temperature
    similarity = similarity.masked_fill(torch.eye(len(z), dtype=torch.bool), float("-inf"))
    partner = torch.arange(len(z)).roll(len(first))
    return F.cross_entropy(similarity, partner)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, digits.target
    encoder = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1, stride=2),
        nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 16, 64),
    )  # fmt: skip
    projector = nn.Sequential(nn.ReLU(), nn.Linear(64, 32))
    optimizer = torch.optim.Adam(list(encoder.parameters()) + list(projector.parameters()), lr=1e-3)
    for step in range(200):
        batch = images[torch.randint(1400, (128,))]
        loss = nt_xent(projector(encoder(augment(batch))), projector(encoder(augment(batch))))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 40 == 0:
            print(f"step {step}  loss {loss.item():.3f}")
    encoder.eval()
    with torch.no_grad():
        features = F.normalize(encoder(images), dim=1).numpy()
    probe = LogisticRegression(C=10.0, max_iter=500).fit(features[:1400], labels[:1400])
    print("accuracy of the probe:", probe.score(features[1400:], labels[1400:]))


if __name__ == "__main__":
    main()
