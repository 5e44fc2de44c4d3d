"""missing-zero-grad: when it is found, and when it is not."""

import numpy as np
import pytest

from isograd.rules.missing_zero_grad import MissingZeroGrad
from isograd.testing import altered, check_rule, plain_network

STEPS = np.arange(100)
STUCK = 2.3 + 0.5 * np.sin(STEPS * 0.3)


def carrying(norm, **changes):
    """A network whose gradients hold so much when a step begins."""
    return altered(plain_network(), carried_grad_norm=np.where(STEPS == 0, 0.0, norm), **changes)


FIRES = {
    # the sum of all gradients so far
    "piling up": (carrying(STEPS * 1.0, global_grad_norm=STEPS + 1.0, loss=STUCK), "error"),
    "and learning": (carrying(STEPS * 1.0), "warning"),
    # read at three deep steps
    "few readings": (carrying(np.where(STEPS < 4, 1.0, np.nan)), "warning"),
}

STAYS_SILENT = {
    "plain": plain_network(),
    "cleared": carrying(0.0),
    # rounding, or a parameter that the program forgot and that does not matter
    "next to nothing": carrying(1e-6),
    # the first batch was run twice
    "once": carrying(np.where(STEPS == 1, 1.0, 0.0)),
    # cleared every other step, on purpose
    "every other step": carrying(np.where(STEPS % 2 == 1, 1.0, 0.0)),
    "not read": carrying(np.nan),
}


@pytest.mark.parametrize("history, level", FIRES.values(), ids=FIRES)
def test_fires(history, level):
    """Gradients that are never cleared are found from the first step, which left them behind."""
    check_rule(MissingZeroGrad, fires=[history], seeds=())
    (finding,) = MissingZeroGrad().check(history)

    assert (level, 0) == (finding.level, finding.first_step)


@pytest.mark.parametrize("history", STAYS_SILENT.values(), ids=STAYS_SILENT)
def test_stays_silent(history):
    """Nothing is found where gradients are cleared between steps."""
    assert [] == list(MissingZeroGrad().check(history))
