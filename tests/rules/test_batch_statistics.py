"""batch-statistics: when it is found, and when it is not."""

from dataclasses import replace

import numpy as np
import pytest

from isograd.rules.batch_statistics import BatchStatistics
from isograd.testing import altered, check_rule, check_severity, plain_network

STEPS = np.arange(100)
STUCK = 2.3 + 0.01 * np.sin(STEPS * 1.7)
FALLING = plain_network()["loss"].values
COLUMNS = [2, 4]  # of the network's activations, two are batch normalizations here


def normalized(batch, *, positions=1, gap=None, calls=1, loss=FALLING, training=True, small_steps=STEPS >= 0):
    """A network with two batch normalizations over `batch` samples of so many positions, at some of the steps."""
    network = plain_network()
    layers = tuple(
        replace(layer, kind="batch-norm", type="BatchNorm1d", shape=(batch, layer.units)) if i in COLUMNS else layer
        for i, layer in enumerate(network.layers)
    )
    is_norm = np.isin(np.arange(len(layers)), COLUMNS)
    size = np.where(small_steps, batch, 64)[:, None] * positions * 64 * calls
    measured = (batch * positions) ** -0.5 if gap is None else gap
    return altered(
        replace(network, layers=layers),
        output_size=lambda v: np.where(is_norm, size, v),
        calls=lambda v: np.where(is_norm, calls, v),
        batch_statistics_gap=np.where(is_norm & training, measured, np.nan) * np.ones((100, 1)),
        loss=loss,
    )


FIRES = {
    # two samples: +1 and -1 whatever they were
    "two": (normalized(2), ("warning", 0)),
    "three": (normalized(3), ("warning", 0)),
    "two, stuck": (normalized(2, loss=STUCK), ("error", 0)),
    # one image whose map has shrunk to two positions
    "two positions": (normalized(1, positions=2), ("warning", 0)),
    # four micro-batches are normalized one by one
    "micro-batches": (normalized(2, calls=4), ("warning", 0)),
    # sorted by class, and it does not learn
    "unlike": (normalized(32, gap=0.9, loss=STUCK), ("warning", 50)),
    # real and generated samples in turn, and it learns
    "in turn": (normalized(32, gap=0.9), ("info", 50)),
}

STAYS_SILENT = {
    "sixty-four": normalized(64),
    "eight": normalized(8),
    "eight, stuck": normalized(8, loss=STUCK),
    # 512 values per channel
    "images": normalized(2, positions=256),
    # running statistics are used: fine-tuning with small batches
    "evaluation mode": normalized(2, training=False),
    # the last batch of an epoch
    "last batch": normalized(2, small_steps=STEPS % 10 == 9),
    # means of eight samples lie 0.35 away
    "chance": normalized(8, gap=0.6, loss=STUCK),
    # running means that start at 0 have to come near first
    "settling": normalized(32, gap=np.where(STEPS < 40, 2.0, 0.18)[:, None], loss=STUCK),
}


@pytest.mark.parametrize("history, expected", FIRES.values(), ids=FIRES)
def test_fires(history, expected):
    """Statistics of two or three values are found from the first step, batches unlike each other in the second half."""
    check_rule(BatchStatistics, fires=[history], seeds=())
    (finding,) = BatchStatistics().check(history)

    assert expected == (finding.level, finding.first_step)
    assert {"act0", "act1"} == set(finding.layers)


@pytest.mark.parametrize("history", STAYS_SILENT.values(), ids=STAYS_SILENT)
def test_stays_silent(history):
    """Nothing is found where values are enough, rare exceptions are small, or no statistics are computed."""
    assert [] == list(BatchStatistics().check(history))


def test_two_values_carry_nothing():
    """Normalized over two values, any two numbers become +1 and -1: the reason for the limit."""
    x = np.array([0.3, 17.0])

    assert np.allclose([-1, 1], (x - x.mean()) / x.std())


def test_fewer_is_never_milder():
    """Fewer values never lower the level."""
    check_severity(BatchStatistics, [normalized(batch, loss=STUCK) for batch in (64, 8, 4, 3, 2)])
