"""loss-oscillation: when it is found, and when it is not."""

import numpy as np
import pytest

from isograd.rules.loss_oscillation import LossOscillation
from isograd.testing import altered, check_rule, plain_network

STEPS = np.arange(200)
RNG = np.random.default_rng(0)
NOISE = 0.02 * RNG.standard_normal(200)


def with_loss(loss):
    return altered(plain_network(steps=200), loss=loss)


FIRES = {
    # gradient descent on a quadratic with a rate of almost 2 / curvature: it jumps across the valley
    "two-cycle, stuck": (with_loss(1.0 + 0.05 * (-1.0) ** STEPS + 0.1 * NOISE), "warning"),
    # the same on the way down
    "two-cycle, falling": (with_loss((0.2 + np.exp(-STEPS / 50)) * (1 + 0.1 * (-1.0) ** STEPS)), "info"),
    # it scatters by more than its own size
    "wide": (with_loss(np.exp(1.2 * RNG.standard_normal(200))), "info"),
}

STAYS_SILENT = {
    "plain": plain_network(steps=200),
    # mini-batch noise about a constant
    "noise": with_loss(0.693 + NOISE),
    # a game between two networks: swings over many steps
    "slow swing": with_loss(0.7 + 0.1 * np.sin(STEPS / 15) + NOISE),
    # converged: near zero every loss scatters
    "near zero": with_loss(2.3 * np.exp(-STEPS / 20) + 1e-3 * np.abs(RNG.standard_normal(200))),
    # a smooth fall
    "falling": with_loss(2.3 * np.exp(-STEPS / 150) + 0.1 * NOISE),
    # restarts of the learning rate
    "restarts": with_loss(0.5 + 0.4 * np.exp(-(STEPS % 50) / 10) + NOISE),
}


@pytest.mark.parametrize("history, level", FIRES.values(), ids=FIRES)
def test_fires(history, level):
    """A two-cycle and a scatter as wide as the loss is high are found, at their level."""
    check_rule(LossOscillation, fires=[history], seeds=())
    (finding,) = LossOscillation().check(history)

    assert level == finding.level


@pytest.mark.parametrize("history", STAYS_SILENT.values(), ids=STAYS_SILENT)
def test_stays_silent(history):
    """Nothing is found in noise, in slow swings, and near zero."""
    assert [] == list(LossOscillation().check(history))


def test_noise_is_seldom_called_an_oscillation():
    """Of 200 series of white noise about a constant, none is called an oscillation."""
    rng = np.random.default_rng(3)
    found = [list(LossOscillation().check(with_loss(1 + 0.1 * rng.standard_normal(200)))) for _ in range(200)]

    # A lag-1 autocorrelation of -0.8 is 0.3 away from that of noise; its standard error with 100 values is 0.07.
    assert not any(found)
