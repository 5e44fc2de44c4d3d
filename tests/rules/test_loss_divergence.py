"""loss-divergence: when it is found, and when it is not."""

import numpy as np
import pytest

from isograd.rules.loss_divergence import LossDivergence
from isograd.testing import altered, check_rule, check_severity, plain_network

STEPS = np.arange(200)
NOISE = 1 + 0.05 * np.sin(STEPS * 2.7)
BASE = plain_network(steps=200)


def with_loss(loss, **changes):
    """A network with this loss; where it is NaN the loss was not finite."""
    return altered(BASE, loss=loss, loss_nonfinite=np.isnan(loss), **changes)


LOST = np.where(STEPS < 150, 2.3, np.nan)
POISONED = with_loss(LOST, grad_nonfinite=lambda v: v + (STEPS >= 150)[:, None])

FIRES = {
    # NaN from step 150 to the end, and in the gradients as well
    "poisoned": (POISONED, ("error", 150)),
    # NaN at the last step, with gradients that stayed finite
    "last step": (with_loss(np.where(STEPS < 199, 2.3, np.nan)), ("warning", 199)),
    # exponential growth that does not end
    "runaway": (with_loss(0.5 * 1.02**STEPS), ("warning", 38)),
    # a thousandfold
    "far gone": (with_loss(0.5 * 1.04**STEPS), ("error", 20)),
    # the level rose to five times the start, and gradients with it
    "higher level": (
        with_loss(np.where(STEPS < 50, 1.0, 5.0) * NOISE, global_grad_norm_unclipped=np.where(STEPS < 50, 1.0, 9.0)),
        ("warning", 50),
    ),
    # a critic's score: its offset, nearly 0 at first, drifts by three hundred times that under the same gradients
    "drifting offset": (
        with_loss(np.where(STEPS < 20, -0.002, 3.2 * np.minimum(1, STEPS / 150)) + 0.01 * np.sin(STEPS * 2.7)),
        ("info", 20),
    ),
    # a likelihood above 1 that runs away, and gradients with it
    "below zero and lost": (
        with_loss(
            np.where(STEPS < 100, 0.5 - STEPS / 50, 400.0) * NOISE,
            global_grad_norm_unclipped=np.where(STEPS < 100, 1.0, 300.0),
        ),
        ("error", 100),
    ),
    # a loss that has doubled and stays there, as bootstrapped targets and adversarial games have
    "doubled": (with_loss(np.where(STEPS < 50, 1.0, 2.2) * NOISE), ("info", 50)),
}

STAYS_SILENT = {
    "plain": BASE,
    # restarts of the learning rate raise the loss fourfold above what it had reached
    "restarts": with_loss((0.04 + 2.3 * np.exp(-(STEPS % 100) / 10) * np.where(STEPS < 100, 1, 0.06)) * NOISE),
    # the first step is a thousand times what follows
    "first step": with_loss(np.where(STEPS == 0, 2464.0, 2.0) * NOISE),
    # a likelihood above 1: the loss falls below zero and further
    "negative": with_loss(0.2 - 3.6 * (1 - np.exp(-STEPS / 40)) + 0.05 * np.sin(STEPS)),
    # a game whose loss drifts by a quarter
    "drift": with_loss((0.6 + 0.15 * STEPS / 199) * NOISE),
    # noise about ln 2
    "coin": with_loss(np.log(2) * NOISE),
    # one NaN on the way that did no harm
    "one bad step": with_loss(np.where(STEPS == 60, np.nan, 2.3 * np.exp(-STEPS / 30))),
    # a gradient scaler skipped the step with the infinite loss
    "scaled": with_loss(np.where(STEPS == 199, np.nan, 1.0), skipped=STEPS == 199),
    # spikes of forty times the level
    "spikes": with_loss(np.where(STEPS % 50 == 49, 1.0, 0.025)),
}


@pytest.mark.parametrize("history, expected", FIRES.values(), ids=FIRES)
def test_fires(history, expected):
    """A loss that ends above its start, or as no number, is found, at its level and from its step."""
    check_rule(LossDivergence, fires=[history], seeds=())
    (finding,) = LossDivergence().check(history)

    assert expected == (finding.level, finding.first_step)


@pytest.mark.parametrize("history", STAYS_SILENT.values(), ids=STAYS_SILENT)
def test_stays_silent(history):
    """Nothing is found where the loss rises for a while, is negative, or merely noisy."""
    assert [] == list(LossDivergence().check(history))


def test_worse_is_never_milder():
    """Faster growth never lowers the level."""
    check_severity(LossDivergence, [with_loss(1.0 * rate**STEPS) for rate in (0.99, 1.0, 1.005, 1.01, 1.03, 1.1)])
