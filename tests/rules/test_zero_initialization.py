"""zero-initialization: when it is found, and when it is not."""

from dataclasses import replace

import numpy as np
import pytest

from isograd.rules.zero_initialization import ZeroInitialization
from isograd.testing import altered, check_rule, plain_network

STEPS = np.arange(100)
COLUMNS = np.arange(10)
WEIGHTS = [0, 2, 4, 6, 8]  # of the five layers; the biases stand between


def zeroed(weights, *, gradients=None, since=0, until=100):
    """These weights are zero, and these gradients (the same ones, if not given), during some steps."""
    during = ((STEPS >= since) & (STEPS < until))[:, None]
    silent = weights if gradients is None else gradients
    return altered(
        plain_network(),
        weight_norm=lambda v: np.where(during & np.isin(COLUMNS, weights), 0.0, v),
        grad_max=lambda v: np.where(during & np.isin(COLUMNS, silent), 0.0, v),
    )


FIRES = {
    "all weights": zeroed(WEIGHTS),
    # the two factors of a low-rank adapter
    "two in series": zeroed([4, 6]),
    "three steps": altered(plain_network(steps=3), weight_norm=0.0, grad_max=0.0),
}

STAYS_SILENT = {
    "plain": plain_network(),
    # a classifier that starts at zero gets a gradient at once
    "zero head": zeroed([8], gradients=[], until=1),
    # one factor of a low-rank adapter is zero: the other one waits a step
    "adapter": zeroed([4], gradients=[6], until=1),
    # residual branches that start at zero: every weight in them waits for a gain
    "branches": zeroed([], gradients=WEIGHTS, until=1),
    # layers that nothing reaches, with ordinary weights
    "unreached": zeroed([], gradients=WEIGHTS),
    # weights that decay took to zero at step 50
    "decayed": zeroed(WEIGHTS, since=50),
    "frozen": replace(
        zeroed([4, 6]), parameters=tuple(replace(p, trainable=False) for p in plain_network().parameters)
    ),
    "one weight": zeroed([4]),
}


@pytest.mark.parametrize("history", FIRES.values(), ids=FIRES)
def test_fires(history):
    """Weights in series that start at zero and never get a gradient are an error from the first step."""
    check_rule(ZeroInitialization, fires=[history], seeds=())
    (finding,) = ZeroInitialization().check(history)

    assert ("error", 0) == (finding.level, finding.first_step)


@pytest.mark.parametrize("history", STAYS_SILENT.values(), ids=STAYS_SILENT)
def test_stays_silent(history):
    """Nothing is found where a zero weight moves, or one that gets no gradient is not zero."""
    assert [] == list(ZeroInitialization().check(history))
