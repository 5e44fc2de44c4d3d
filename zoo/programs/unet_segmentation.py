"""A U-Net that separates bright disks from noise: binary cross-entropy plus Dice loss."""

import argparse

import torch
from torch import nn


def make_images(count, size=32):
    """Noisy images (count, 1, size, size) with one disk each, and the disk's mask."""
    grid = torch.arange(size, dtype=torch.float32)
    center = torch.rand(count, 2, 1, 1) * size * 0.6 + size * 0.2
    radius = torch.rand(count, 1, 1) * size * 0.15 + size * 0.1
    inside = (grid[:, None] - center[:, 0]) ** 2 + (grid - center[:, 1]) ** 2 < radius**2
    mask = inside.float()[:, None]
    return mask + 0.7 * torch.randn(count, 1, size, size), mask


def double_conv(inside, outside):
    return nn.Sequential(
        nn.Conv2d(inside, outside, 3, padding=1), nn.BatchNorm2d(outside), nn.ReLU(inplace=True),
        nn.Conv2d(outside, outside, 3, padding=1), nn.BatchNorm2d(outside), nn.ReLU(inplace=True),
    )  # fmt: skip


class UNet(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.down1, self.down2 = double_conv(1, width), double_conv(width, 2 * width)
        self.middle = double_conv(2 * width, 4 * width)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.merge2 = double_conv(4 * width, 2 * width)
        self.up1 = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.merge1 = double_conv(2 * width, width)
        self.out = nn.Conv2d(width, 1, 1)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x):
        fine = self.down1(x)
        coarse = self.down2(self.pool(fine))
        middle = self.middle(self.pool(coarse))
        x = self.merge2(torch.cat([self.up2(middle), coarse], 1))
        return self.out(self.merge1(torch.cat([self.up1(x), fine], 1)))


def dice(probability, mask):
    overlap = (probability * mask).sum((1, 2, 3))
    return (2 * overlap + 1) / (probability.sum((1, 2, 3)) + mask.sum((1, 2, 3)) + 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model = UNet()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(120):
        images, masks = make_images(16)
        logits = model(images)
        bce = nn.functional.binary_cross_entropy_with_logits(logits, masks)
        loss = bce + (1 - dice(torch.sigmoid(logits), masks)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step}  loss {loss.item():.3f}")
    model.eval()
    with torch.no_grad():
        images, masks = make_images(64)
        print("dice:", dice((model(images) > 0).float(), masks).mean().item())


if __name__ == "__main__":
    main()
