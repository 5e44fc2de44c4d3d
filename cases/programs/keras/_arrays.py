"""Small data sets drawn from a generator of their own: the seed of a program changes its weights, never its data."""

import numpy as np


def blobs(rows=600, columns=20, classes=10, spread=2.0):
    """Gaussian clusters of unit width around centers `spread` apart: x [rows, columns], labels [rows]."""
    draw = np.random.default_rng(0)
    centers = draw.standard_normal((classes, columns)) * spread
    labels = draw.integers(0, classes, rows)
    return float32(centers[labels] + draw.standard_normal((rows, columns))), labels


def images(rows=512, *, size=16, channels=1, noise=0.5):
    """Ten smooth templates with noise: x [rows, size, size, channels], labels [rows]."""
    draw = np.random.default_rng(0)
    places = np.clip((np.arange(size) + 0.5) * 4 / size - 0.5, 0, 3)
    bilinear = np.maximum(0, 1 - abs(places[:, None] - np.arange(4)))  # [size, 4]
    templates = np.einsum("ai,bj,nijc->nabc", bilinear, bilinear, draw.standard_normal((10, 4, 4, channels)))
    labels = draw.integers(0, 10, rows)
    return float32(templates[labels] + noise * draw.standard_normal((rows, size, size, channels))), labels


def moons(rows=400, noise=0.1):
    """Two interleaved half circles: x [rows, 2], labels [rows]."""
    draw = np.random.default_rng(0)
    angle = draw.random(rows) * np.pi
    labels = draw.integers(0, 2, rows)
    across = np.where(labels == 0, np.cos(angle), 1 - np.cos(angle))
    along = np.where(labels == 0, np.sin(angle), 0.5 - np.sin(angle))
    return float32(np.stack([across, along], 1) + noise * draw.standard_normal((rows, 2))), labels


def standardized(x):
    """Every column with mean 0 and standard deviation 1."""
    return (x - x.mean(0)) / x.std(0)


def unit_range(x):
    """All entries together in [0, 1]."""
    return (x - x.min()) / (x.max() - x.min())


def float32(x):
    """As Keras takes it by default."""
    return x.astype("float32")
