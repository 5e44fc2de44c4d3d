"""update-below-precision: when it is found, and when it is not."""

from dataclasses import replace

import numpy as np
import pytest

from isograd.rules.update_below_precision import UpdateBelowPrecision
from isograd.testing import altered, check_rule, plain_network

STEPS = np.arange(100)
SLOW = 2.3 - 1.5 * STEPS / 100


def unmoved(columns, *, share=1.0, dtype="bfloat16", loss=SLOW, **changes):
    """A network in this type, some of whose parameters stay exactly as they are in a share of the steps."""
    still = (STEPS % 100 < 100 * share)[:, None]
    history = altered(
        plain_network(),
        loss=loss,
        update_norm=lambda v: np.where(still & np.isin(np.arange(v.shape[1]), columns), 0.0, v),
        **changes,
    )
    return replace(history, parameters=tuple(replace(p, dtype=dtype) for p in history.parameters))


FIRES = {
    # the gain of a normalization: next to 1 nothing is near
    "one tensor": unmoved([2]),
    "most of the time": unmoved([2], share=0.95),
    "half precision": unmoved([2, 4], dtype="float16"),
}

STAYS_SILENT = {
    "plain": plain_network(),
    # rounded, but it gets there
    "half of the time": unmoved([2], share=0.5),
    "float32": unmoved([2], dtype="float32"),
    # nothing to move by
    "no gradient": unmoved([2], grad_max=lambda v: np.where(np.arange(v.shape[1]) == 2, 0.0, v)),
    "no rate": unmoved([2], learning_rate=0.0),
    "solved": unmoved([2], loss=2.3 * np.exp(-STEPS / 5)),
    "few readings": altered(unmoved([2]), update_norm=lambda v: np.where((STEPS < 4)[:, None], v, np.nan)),
}


@pytest.mark.parametrize("history", FIRES.values(), ids=FIRES)
def test_fires(history):
    """A tensor whose every update is rounded away is warned of, by name."""
    check_rule(UpdateBelowPrecision, fires=[history], seeds=())
    (finding,) = UpdateBelowPrecision().check(history)

    assert ("warning", "linear1.weight") == (finding.level, finding.layers[0])


@pytest.mark.parametrize("history", STAYS_SILENT.values(), ids=STAYS_SILENT)
def test_stays_silent(history):
    """Nothing is found where weights move, are kept in full precision, or have nothing to move by."""
    assert [] == list(UpdateBelowPrecision().check(history))
