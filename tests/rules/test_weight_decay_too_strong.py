"""weight-decay-too-strong: when it is found, and when it is not."""

from dataclasses import replace

import numpy as np
import pytest

from isograd.rules.weight_decay_too_strong import WeightDecayTooStrong
from isograd.testing import altered, check_rule, plain_network

STEPS = np.arange(100)
STUCK = 1.3 + 0.01 * np.sin(STEPS * 1.7)
SHRINKING = np.maximum(0.1, np.exp(-STEPS / 10))[:, None]


def decaying(decay, *, left=SHRINKING, loss=STUCK, **group):
    """A network under this decay at a learning rate of 0.1 whose weights shrink like `left`."""
    history = altered(plain_network(), weight_norm=lambda v: v * left, loss=loss)
    return replace(history, groups=({"optimizer": "SGD", "lr": 0.1, "weight_decay": decay, **group},))


FIRES = {
    "half": decaying(0.5),
    # the pull acts ten times under momentum
    "momentum": decaying(0.05, momentum=0.9),
    "decoupled": replace(decaying(0.5), groups=({"optimizer": "AdamW", "lr": 0.1, "weight_decay": 0.5},)),
}

STAYS_SILENT = {
    "plain": plain_network(),
    # a usual value, in a run that is stuck for another reason
    "usual": decaying(5e-4, left=1.0),
    # weights shrink, but the decay is too weak to have done it
    "shrinking by itself": decaying(1e-4),
    "none": decaying(0.0),
    # behind normalization weights may shrink and the model learns
    "learns": decaying(0.5, loss=plain_network()["loss"].values),
    # strong, and the gradient holds against it
    "held": decaying(0.5, left=0.9),
    # a start from zero has nothing to lose
    "zero weights": decaying(0.5, left=0.0),
}


@pytest.mark.parametrize("history", FIRES.values(), ids=FIRES)
def test_fires(history):
    """Weights that decay takes away from a run that is stuck are an error."""
    check_rule(WeightDecayTooStrong, fires=[history], seeds=())
    (finding,) = WeightDecayTooStrong().check(history)

    assert ("error", 0) == (finding.level, finding.first_step)
    assert 5 == len(finding.layers)


@pytest.mark.parametrize("history", STAYS_SILENT.values(), ids=STAYS_SILENT)
def test_stays_silent(history):
    """Nothing is found where the loss falls, weights stay, or decay is too weak to matter."""
    assert [] == list(WeightDecayTooStrong().check(history))
