"""A generative adversarial network on points, with the non-saturating loss.

Scary     Its losses never fall; the generator's even drifts upwards.
Healthy   The samples come nearer to the data's mean: quite normal as long as the losses do not explode
          (github.com/junyanz/pytorch-CycleGAN-and-pix2pix/issues/335, 164).
"""

import torch
from _command import arguments, verdict
from torch import nn
from torch.nn import functional as F

ACCEPTED = ()
MEAN = (2.0, -1.0)


def main():
    args = arguments(__doc__, pair=False)
    torch.manual_seed(args.seed)
    generator = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
    discriminator = nn.Sequential(nn.Linear(2, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))
    generator_optimizer = torch.optim.Adam(generator.parameters(), lr=2e-3, betas=(0.5, 0.9))
    discriminator_optimizer = torch.optim.Adam(discriminator.parameters(), lr=2e-3, betas=(0.5, 0.9))
    mean = torch.tensor(MEAN)

    generator_losses, distances = [], []
    for step in range(1500):
        real = torch.randn(64, 2) * 0.3 + mean
        fake = generator(torch.randn(64, 4))
        discriminator_loss = F.softplus(-discriminator(real)).mean() + F.softplus(discriminator(fake.detach())).mean()
        discriminator_optimizer.zero_grad()
        discriminator_loss.backward()
        discriminator_optimizer.step()
        generator_loss = F.softplus(-discriminator(fake)).mean()
        generator_optimizer.zero_grad()
        generator_loss.backward()
        generator_optimizer.step()
        generator_losses.append(generator_loss.item())
        if step % 100 == 99:
            distances.append((generator(torch.randn(500, 4)).mean(0) - mean).norm().item())

    verdict(
        max(distances[-5:]) < distances[0], word="healthy",
        first_loss=generator_losses[0], loss=generator_losses[-1], distance=distances[0], end=max(distances[-5:]),
    )  # fmt: skip


if __name__ == "__main__":
    main()
