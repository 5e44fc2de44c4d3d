"""learning-rate-decayed: when it is found, and when it is not."""

import numpy as np
import pytest

from isograd.rules.learning_rate_decayed import LearningRateDecayed
from isograd.testing import altered, check_rule, plain_network

STEPS = np.arange(200)
NOISE = 0.02 * np.sin(STEPS * 1.7)


def scheduled(rate, loss=None):
    """200 steps of a network under this learning rate; by default its loss falls until step 60 and stays."""
    falling = 2.3 - 1.5 * np.minimum(STEPS, 60) / 60 + NOISE
    return altered(
        plain_network(steps=200),
        learning_rate=np.broadcast_to(rate, STEPS.shape)[:, None],
        loss=falling if loss is None else loss,
    )


FIRES = {
    # a factor of 0 where 1 was meant
    "zero at 60": (scheduled(np.where(STEPS < 60, 1e-3, 0.0)), 60),
    # a decay that is meant per epoch, applied per step: 0.891 ** 60 is 1e-3
    "per step": (scheduled(0.1 * 0.8912**STEPS), 60),
    "four drops": (scheduled(0.1 * 0.1 ** np.minimum(STEPS // 20, 4)), 60),
}

STAYS_SILENT = {
    "plain": plain_network(),
    "constant": scheduled(0.1),
    # to zero at the end
    "cosine": scheduled(0.05 * (1 + np.cos(np.pi * STEPS / 199))),
    "line": scheduled(0.1 * (1 - STEPS / 200)),
    "three drops": scheduled(0.1 * 0.1 ** np.minimum(STEPS // 60, 3)),
    # restarts: the rate comes back
    "cycles": scheduled(0.05 * (1 + np.cos(np.pi * (STEPS % 40) / 40))),
    "warm-up": scheduled(0.1 * np.minimum(1, STEPS / 100)),
    # the loss had been on its plateau for long when the rate fell
    "after a plateau": scheduled(np.where(STEPS < 120, 0.1, 1e-6), loss=2.0 - 0.9 * np.exp(-STEPS / 5) * 0 + NOISE),
    # it was solved by then
    "solved": scheduled(np.where(STEPS < 60, 0.1, 0.0), loss=2.3 * np.exp(-STEPS / 10) + 1e-3),
}


@pytest.mark.parametrize("history, step", FIRES.values(), ids=FIRES)
def test_fires(history, step):
    """A rate that is gone while the loss was falling is warned of, from the step at which it was."""
    check_rule(LearningRateDecayed, fires=[history], seeds=())
    (finding,) = LearningRateDecayed().check(history)

    assert "warning" == finding.level
    assert abs(step - finding.first_step) <= 20


@pytest.mark.parametrize("history", STAYS_SILENT.values(), ids=STAYS_SILENT)
def test_stays_silent(history):
    """Nothing is found where the rate ends with the run, comes back, or fell when nothing was left to learn."""
    assert [] == list(LearningRateDecayed().check(history))
