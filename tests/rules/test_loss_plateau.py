"""loss-plateau: when it is found, on which floor, and when it is not."""

from dataclasses import replace

import numpy as np
import pytest

from isograd.rules.loss_plateau import LossPlateau
from isograd.testing import altered, check_rule, plain_network

STEPS = np.arange(200)
NOISE = 0.01 * np.random.default_rng(0).standard_normal(200)


def with_loss(loss, *, classes=10, variance=None):
    """A network with this loss, for so many classes, or with targets of this variance."""
    history = altered(plain_network(steps=200, classes=classes), loss=loss)
    if variance is None:
        return history
    layers = tuple(replace(layer, type="float32") if layer.role == "target" else layer for layer in history.layers)
    return altered(replace(history, layers=layers), output_std=np.sqrt(variance))


FIRES = {
    "at ln 10": (with_loss(np.log(10) + NOISE), "ln 10 = 2.3026"),
    # labels that say nothing: it looks the same, which is why it is no alarm
    "coin": (with_loss(np.log(2) + NOISE, classes=2), "ln 2 = 0.6931"),
    # softmax applied twice, K = 4: it falls from 1.39 and then sits on ln(e + 3) - 1
    "double softmax": (
        with_loss(0.7437 + 0.64 * np.exp(-STEPS / 10) + 0.1 * NOISE, classes=4),
        r"ln(e + 3) - 1 = 0.7437",
    ),
    # the prediction is the mean of the targets
    "mean": (with_loss(4.25 + 3 * np.exp(-STEPS / 5) + NOISE, variance=4.25), "the variance of the targets, 4.25"),
    "nowhere": (with_loss(1.5 + 0 * NOISE), "0.0 % of its start"),
}

STAYS_SILENT = {
    "plain": plain_network(steps=200),
    # converged early and flat since
    "converged": with_loss(2.3 * np.exp(-STEPS / 10) + 0.01 + 0.1 * NOISE),
    # slow, and still falling
    "slow": with_loss(2.3 - 0.6 * STEPS / 199 + NOISE),
    "negative": with_loss(-3.5 + 3.6 * np.exp(-STEPS / 40) + NOISE),
    # it diverges, which has a name of its own
    "rising": with_loss(1.5 * 1.02**STEPS),
    "short": altered(plain_network(steps=30), loss=2.3),
}


@pytest.mark.parametrize("history, words", FIRES.values(), ids=FIRES)
def test_fires(history, words):
    """A loss that stands is found, with the name of its floor, and is no alarm by itself."""
    # ln K is a number of nats: the rule knows such losses by their absolute value.
    check_rule(LossPlateau, fires=[history], seeds=(), factors=())
    (finding,) = LossPlateau().check(history)

    assert finding.level == "info"
    assert words in finding.message


@pytest.mark.parametrize("history", STAYS_SILENT.values(), ids=STAYS_SILENT)
def test_stays_silent(history):
    """Nothing is found where the loss falls, has fallen, or rises."""
    assert [] == list(LossPlateau().check(history))
