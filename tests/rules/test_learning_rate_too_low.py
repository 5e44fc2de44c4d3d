"""learning-rate-too-low: when it is found, and when it is not."""

import numpy as np
import pytest

from isograd.rules.learning_rate_too_low import LearningRateTooLow
from isograd.testing import altered, check_rule, plain_network

STEPS = np.arange(100)
STUCK = 2.3 + 0.01 * np.sin(STEPS * 1.7)


def steps_of(ratio, *, loss=STUCK, **changes):
    """A network whose update/weight ratios have this size."""
    return altered(plain_network(), update_ratio=ratio, loss=loss, **changes)


FIRES = {
    # a rate of 1e-7 where 1e-3 is usual
    "tiny": steps_of(1e-7),
    "just below": steps_of(9e-6),
    # it falls, by a thousandth
    "crawling": steps_of(1e-6, loss=2.3 - 2e-5 * STEPS),
}

STAYS_SILENT = {
    "plain": plain_network(),
    # usual steps in a run that does not learn: something else is wrong
    "usual steps": steps_of(1e-3),
    # tiny steps near the end of a run that learned
    "tiny and well": steps_of(1e-7, loss=plain_network()["loss"].values),
    # a warm-up from nothing
    "warm-up": steps_of(1e-9 + 1e-4 * (STEPS / 99)[:, None]),
    # the schedule has reached zero
    "decayed": steps_of(np.where(STEPS < 5, 1e-6, 0.0)[:, None], learning_rate=np.where(STEPS < 5, 0.1, 0.0)[:, None]),
    # no gradient at all: no rate would help
    "no gradient": steps_of(0.0, grad_max=0.0),
    # the layers near the input receive nothing, the last one moves as usual
    "vanishing": steps_of(10.0 ** (np.arange(10) - 12.0)),
    "short": altered(plain_network(steps=20), update_ratio=1e-7, loss=2.3),
    # it diverges
    "rising": steps_of(1e-7, loss=2.3 * 1.05**STEPS),
}


@pytest.mark.parametrize("history", FIRES.values(), ids=FIRES)
def test_fires(history):
    """A run in which no weight can go anywhere is warned of, from its first step."""
    check_rule(LearningRateTooLow, fires=[history], seeds=())
    (finding,) = LearningRateTooLow().check(history)

    assert ("warning", 0) == (finding.level, finding.first_step)


@pytest.mark.parametrize("history", STAYS_SILENT.values(), ids=STAYS_SILENT)
def test_stays_silent(history):
    """Nothing is found where the loss falls, anything moves, or there is no gradient to move by."""
    assert [] == list(LearningRateTooLow().check(history))
