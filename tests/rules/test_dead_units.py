"""dead-units: when it is found, and when it is not."""

import numpy as np
import pytest

from isograd.rules.dead_units import DeadUnits
from isograd.testing import altered, check_rule, check_severity, plain_network

STEPS = np.arange(100)
STUCK = 2.3 + 0.01 * np.sin(STEPS * 1.7)


def dead(share, *, layers=(4,), since=0, loss=None, activation="relu", **changes):
    """A network some of whose activation layers have so many dead units from a step on."""
    changed = altered(
        plain_network(activation=activation),
        dead_fraction=lambda v: np.where(np.isin(np.arange(v.shape[1]), layers) & (STEPS >= since)[:, None], share, v),
        **changes,
    )
    return changed if loss is None else altered(changed, loss=loss)


FIRES = {
    # one layer cuts the network in two
    "cut": (dead(1.0, loss=STUCK), ("error", "act1", 0)),
    # killed by an update at step 30
    "killed": (dead(1.0, layers=(6, 8), since=30, loss=STUCK), ("error", "act2", 30)),
    # the loss fell from far away to the variance of the targets, and nothing before the layer receives a gradient
    "cut, partly fallen": (
        dead(
            1.0,
            since=8,
            loss=np.where(STEPS < 8, 3180, 500),
            grad_max=lambda v: v * ((np.arange(10) > 3) | (STEPS < 8)[:, None]),
        ),
        ("error", "act1", 8),
    ),
    # most of a layer
    "most": (dead(0.93, loss=STUCK), ("warning", "act1", 0)),
    # most of a layer, and it learns with the rest
    "most, learning": (dead(0.93), ("info", "act1", 0)),
}

STAYS_SILENT = {
    "plain": plain_network(),
    # the usual
    "forty percent": dead(0.4, loss=STUCK),
    # small networks on small data end like this and fit well
    "sixty percent": dead(0.6, loss=STUCK),
    # a batch that happened to miss the units
    "once": altered(dead(0.0), dead_fraction=lambda v: np.where((STEPS == 50)[:, None], 1.0, v)),
    # dead at first, and back
    "recovered": altered(dead(0.0), dead_fraction=lambda v: np.where((STEPS < 90)[:, None], 1.0, v)),
    # a wide layer with a negative bias: 87 % of its activations are zero, 1.6 % of its units dead
    "sparse": altered(dead(0.016), output_zero_fraction=0.87),
    # tanh in its flat ends is saturated, which has a name of its own
    "tanh": dead(1.0, activation="tanh", loss=STUCK),
}


@pytest.mark.parametrize("history, expected", FIRES.values(), ids=FIRES)
def test_fires(history, expected):
    """Dead layers are found, at their level, the deadest first, since they died."""
    check_rule(DeadUnits, fires=[history], seeds=())
    (finding,) = DeadUnits().check(history)

    assert expected == (finding.level, finding.layers[0], finding.first_step)


@pytest.mark.parametrize("history", STAYS_SILENT.values(), ids=STAYS_SILENT)
def test_stays_silent(history):
    """Nothing is found where units live, come back, or were missed by one batch."""
    assert [] == list(DeadUnits().check(history))


def test_worse_is_never_milder():
    """A larger dead share never lowers the level."""
    check_severity(DeadUnits, [dead(share, loss=STUCK) for share in (0, 0.5, 0.91, 0.97, 1)])
