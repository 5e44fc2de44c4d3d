"""loss-spike: when it is found, and when it is not."""

import numpy as np
import pytest

from isograd.rules.loss_spike import LossSpike
from isograd.testing import altered, check_rule, plain_network

STEPS = np.arange(300)
NOISE = 0.05 * np.random.default_rng(0).standard_normal(300)
FALLING = 2.3 * np.exp(-STEPS / 80) + 0.2


def with_loss(loss):
    return altered(plain_network(steps=300), loss=loss)


FIRES = {
    # one step of ten times the level
    "one": (with_loss(FALLING * np.where(STEPS == 250, 30, 1) * (1 + NOISE)), (250, 250)),
    # a stretch of five steps, and another
    "two": (
        with_loss((2 - STEPS / 400) * np.where((STEPS // 5 == 30) | (STEPS == 250), 4, 1) * (1 + NOISE)),
        (150, 250),
    ),
    # a likelihood loss below zero
    "negative": (with_loss(-3 + NOISE + np.where(STEPS == 120, 6.0, 0)), (120, 120)),
}

STAYS_SILENT = {
    "plain": plain_network(),
    "falling": with_loss(FALLING * (1 + NOISE)),
    "noise": with_loss(0.693 * (1 + NOISE)),
    # heavy, but as usual: log-normal noise of half its level
    "wide noise": with_loss(0.7 * np.exp(0.5 * np.random.default_rng(1).standard_normal(300))),
    # it does not come back: that is divergence
    "level shift": with_loss(np.where(STEPS < 100, 1.0, 8.0) * (1 + NOISE)),
    "ends high": with_loss(np.where(STEPS == 299, 80.0, 1.0) * (1 + NOISE)),
    # before anything is known of its range
    "first step": with_loss(np.where(STEPS == 0, 2464.0, 2.0) * (1 + NOISE)),
    # sixty sigma of a constant loss, and a thousandth of its level
    "tiny": with_loss(1.0 + 1e-5 * NOISE + np.where(STEPS == 150, 1e-3, 0)),
}


@pytest.mark.parametrize("history, steps", FIRES.values(), ids=FIRES)
def test_fires(history, steps):
    """A loss that leaves its range and comes back is found, from its first to its last spike, and is no alarm."""
    check_rule(LossSpike, fires=[history], seeds=())
    (finding,) = LossSpike().check(history)

    assert ("info", *steps) == (finding.level, finding.first_step, finding.last_step)


@pytest.mark.parametrize("history", STAYS_SILENT.values(), ids=STAYS_SILENT)
def test_stays_silent(history):
    """Nothing is found where noise explains the height, or the loss does not come back."""
    assert [] == list(LossSpike().check(history))
