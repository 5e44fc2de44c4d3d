"""replica-drift: when it is found, and when it is not."""

from dataclasses import replace

import numpy as np
import pytest

from isograd._history import Event
from isograd.rules.replica_drift import ReplicaDrift
from isograd.testing import altered, check_rule, check_severity, plain_network

STEPS = np.arange(100)[:, None]


def drifting(size, *, since=3):
    """Two ranks whose second weight drifts apart, up to a relative difference of `size`."""
    grown = size * (STEPS >= since) * (np.arange(10) == 2) * STEPS / 99
    return altered(plain_network(), replica_difference=grown)


TOLD = Event(step=5, kind="replica-drift", data={"name": "linear0.weight", "difference": 0.4})

FIRES = {
    # each rank trains for itself
    "apart": (drifting(0.44), ("linear1.weight", 3)),
    # an event of the observer
    "told": (replace(plain_network(), events=(TOLD,)), ("linear0.weight", 5)),
}

STAYS_SILENT = {
    "one process": plain_network(),
    "equal": altered(plain_network(), replica_difference=0.0),
    # another order of summation
    "rounding": drifting(2e-7),
}


@pytest.mark.parametrize("history, expected", FIRES.values(), ids=FIRES)
def test_fires(history, expected):
    """Replicas that differ are an error, with the parameter and the first step."""
    check_rule(ReplicaDrift, fires=[history], seeds=())
    (finding,) = ReplicaDrift().check(history)

    assert ("error", expected) == (finding.level, (finding.layers[0], finding.first_step))


@pytest.mark.parametrize("history", STAYS_SILENT.values(), ids=STAYS_SILENT)
def test_stays_silent(history):
    """Nothing is found in one process, and between equal replicas."""
    assert [] == list(ReplicaDrift().check(history))


def test_worse_is_never_milder():
    """A larger difference never lowers the level."""
    check_severity(ReplicaDrift, [drifting(size) for size in (0, 1e-8, 1e-4, 1)])
