"""Small data sets drawn from a generator of their own: the seed of a program changes its weights, never its data."""

import math

import torch
from torch.nn import functional as F


def blobs(rows=600, columns=20, classes=10, spread=2.0):
    """Gaussian clusters of unit width around centers `spread` apart: x [rows, columns], labels [rows]."""
    draw = torch.Generator().manual_seed(0)
    centers = torch.randn(classes, columns, generator=draw) * spread
    labels = torch.randint(0, classes, (rows,), generator=draw)
    return centers[labels] + torch.randn(rows, columns, generator=draw), labels


def images(rows=512, *, size=16, channels=1, noise=0.5):
    """Ten smooth templates with noise: x [rows, channels, size, size], labels [rows]."""
    draw = torch.Generator().manual_seed(0)
    templates = F.interpolate(torch.randn(10, channels, 4, 4, generator=draw), size=size, mode="bilinear")
    labels = torch.randint(0, 10, (rows,), generator=draw)
    return templates[labels] + noise * torch.randn(rows, channels, size, size, generator=draw), labels


def moons(rows=400, noise=0.1):
    """Two interleaved half circles: x [rows, 2], labels [rows]."""
    draw = torch.Generator().manual_seed(0)
    angle = torch.rand(rows, generator=draw) * math.pi
    labels = torch.randint(0, 2, (rows,), generator=draw)
    across = torch.where(labels == 0, angle.cos(), 1 - angle.cos())
    along = torch.where(labels == 0, angle.sin(), 0.5 - angle.sin())
    return torch.stack([across, along], 1) + noise * torch.randn(rows, 2, generator=draw), labels


def minibatches(x, y, *, size=64, steps=200, seed=0):
    """`steps` batches of `size` rows drawn with replacement."""
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(0, len(x), (size,), generator=draw)
        yield x[rows], y[rows]


def standardized(x):
    """Every column with mean 0 and standard deviation 1."""
    return (x - x.mean(0)) / x.std(0)


def unit_range(x):
    """All entries together in [0, 1]."""
    return (x - x.min()) / (x.max() - x.min())
