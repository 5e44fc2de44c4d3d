"""A generator trained on log(1 - D), with five discriminator steps to one of its own.

Seen      The discriminator's loss goes to 1e-6, the generator's gradient likewise.
Cause     log(1 - D) is flat once the discriminator is sure.
Fix       The loss -log D, one step each, and labels smoothed to 0.9.
Source    github.com/iwtw/pytorch-TP-GAN/issues/6, github.com/soumith/ganhacks/issues/36, 40
Sure      B: several users agree
Repaired  A generator's gradient above 0.1, and samples within 0.6 of the data's mean
"""

import torch
from _command import arguments, verdict
from torch import nn
from torch.nn import functional as F

ACCEPTED = ("saturated-discriminator",)


def real_points(count):
    return torch.randn(count, 2) * 0.2 + 4


def main():
    args = arguments(__doc__)
    torch.manual_seed(args.seed)
    generator = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
    discriminator = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    generator_optimizer = torch.optim.Adam(generator.parameters(), lr=1e-3)
    discriminator_optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-3)
    real_labels = torch.full((64, 1), 0.9 if args.fixed else 1.0)

    discriminator_losses, grad_norms = [], []
    for _ in range(600):
        for _ in range(1 if args.fixed else 5):
            fake = generator(torch.randn(64, 4)).detach()
            discriminator_loss = F.binary_cross_entropy_with_logits(
                discriminator(real_points(64)), real_labels
            ) + F.binary_cross_entropy_with_logits(discriminator(fake), torch.zeros(64, 1))
            discriminator_optimizer.zero_grad()
            discriminator_loss.backward()
            discriminator_optimizer.step()
        judged = discriminator(generator(torch.randn(64, 4)))
        if args.fixed:
            loss = F.binary_cross_entropy_with_logits(judged, torch.ones_like(judged))
        else:
            loss = torch.log(1 - torch.sigmoid(judged) + 1e-8).mean()
        generator_optimizer.zero_grad()
        loss.backward()
        grad_norms.append(nn.utils.get_total_norm([p.grad for p in generator.parameters()]).item())
        generator_optimizer.step()
        discriminator_losses.append(discriminator_loss.item())

    grad_norm = sum(grad_norms[-50:]) / 50
    distance = (generator(torch.randn(500, 4)).mean(0) - 4).norm().item()
    verdict(
        grad_norm > 0.1 and distance < 0.6,
        discriminator_loss=sum(discriminator_losses[-50:]) / 50, generator_grad_norm=grad_norm, distance=distance,
    )  # fmt: skip


if __name__ == "__main__":
    main()
