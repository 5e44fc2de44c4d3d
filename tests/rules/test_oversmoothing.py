"""oversmoothing: when it is found, and when it is not."""

from dataclasses import replace

import numpy as np
import pytest

from isograd._history import Event
from isograd.rules.oversmoothing import Oversmoothing
from isograd.testing import altered, check_rule, check_severity, plain_network

STEPS = np.arange(100)
STUCK = 1.0986 + 0.004 * np.sin(STEPS * 1.7)
NETWORK = plain_network(depth=8)
DEPTH = np.array([(layer.position - 1) / 2 for layer in NETWORK.layers])  # 0 for the first linear layer


def smoothed(left, *, start=0.8, floor=1e-4, mixings=8, loss=STUCK, steps=STEPS >= 0):
    """A network in which each layer leaves this share of what told two rows apart behind the layer before it."""
    difference = np.maximum(start * left**DEPTH, floor)
    history = altered(NETWORK, row_similarity=np.where(steps[:, None], 1 - difference, 0.3), loss=loss)
    return replace(history, events=(Event(step=0, kind="loss-graph", data={"mixings": mixings}),))


def with_attention(history):
    """The same with a layer of attention and no other sign that rows meet."""
    layers = tuple(replace(entry, kind="attention") if i == 2 else entry for i, entry in enumerate(history.layers))
    return replace(history, layers=layers, events=())


FIRES = {
    "graph": (smoothed(0.2), "error"),
    # all at once, behind the first layer
    "at once": (smoothed(0.01), "error"),
    "tokens": (with_attention(smoothed(0.2)), "error"),
    # it fits what the first features give and stays there
    "partly learned": (smoothed(0.2, loss=np.where(STEPS < 20, 1.1 - 0.02 * STEPS, 0.7)), "warning"),
    # most of the time
    "mostly": (smoothed(0.2, steps=STEPS % 5 > 0), "error"),
}

STAYS_SILENT = {
    "not read": altered(smoothed(0.2), row_similarity=np.nan),
    "different": smoothed(0.95),
    # what is left is enough for the readout
    "learning": smoothed(0.2, loss=1.1 * np.exp(-STEPS / 25)),
    # rows never meet: a plain chain, which has a name of its own
    "no mixing": smoothed(0.2, mixings=0),
    # constant features, a class token: alike from the input on
    "alike from the start": smoothed(0.9, start=0.005),
    # at first only
    "at first": smoothed(0.2, steps=STEPS < 20),
}


@pytest.mark.parametrize("history, level", FIRES.values(), ids=FIRES)
def test_fires(history, level):
    """Rows that become equal with depth under a stuck loss are found from the first reading."""
    check_rule(Oversmoothing, fires=[history], seeds=())
    (finding,) = Oversmoothing().check(history)

    assert level == finding.level
    assert finding.first_step <= 1


@pytest.mark.parametrize("history", STAYS_SILENT.values(), ids=STAYS_SILENT)
def test_stays_silent(history):
    """Nothing is found where rows differ, need not differ, or never meet."""
    assert [] == list(Oversmoothing().check(history))


def test_averaging_makes_rows_equal():
    """Repeated averaging over neighbors takes the cosine between rows to 1: the mechanism itself."""
    rng = np.random.default_rng(0)
    adjacency = (rng.random((40, 40)) < 0.15) | np.eye(40, dtype=bool)
    average = adjacency / adjacency.sum(axis=1, keepdims=True)
    rows = rng.standard_normal((40, 8)) + 0.5
    similarity = []
    for _ in range(12):
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        similarity.append((np.sum(unit @ unit.T) - 40) / (40 * 39))
        rows = average @ rows

    assert similarity[0] < 0.5
    assert similarity[-1] > 1 - Oversmoothing().left


def test_stronger_is_never_milder():
    """Stronger smoothing never lowers the level."""
    check_severity(Oversmoothing, [smoothed(left) for left in (1, 0.8, 0.4, 0.1, 0.01)])
