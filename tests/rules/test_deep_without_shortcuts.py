"""deep-without-shortcuts: when it is found, and when it is not."""

from dataclasses import replace

import numpy as np
import pytest

from isograd._history import Event
from isograd.rules.deep_without_shortcuts import DeepWithoutShortcuts
from isograd.testing import altered, check_rule, check_severity, plain_network

STEPS = np.arange(100)
STUCK = 2.3 + 0.01 * np.sin(STEPS * 1.7)
NETWORK = plain_network(depth=24)
DEPTH = np.array([(layer.position - 1) / 2 for layer in NETWORK.layers])


def chain(per_layer, *, products=25, shortcuts=0, norms=0, alike=0.5, loss=STUCK, weights=1.0):
    """A chain of 25 layers whose gradient changes by 10^-per_layer on its way back through each."""
    history = altered(
        NETWORK,
        signal_norm=lambda v: v * 10.0 ** (-per_layer * (24 - DEPTH)),
        row_similarity=1 - np.maximum(0.9 * (1 - alike) ** DEPTH, 1e-6),
        weight_norm=lambda v: weights * v,
        loss=loss,
    )
    facts = {"products": products, "shortcuts": shortcuts, "norms": norms}
    return replace(history, events=(Event(step=0, kind="loss-graph", data=facts),))


FIRES = {
    "vanishing": (chain(0.2, alike=0.0), "error"),
    "exploding": (chain(-0.2, alike=0.0), "error"),
    # the norm survives, what told samples apart does not
    "samples merge": (chain(0.0), "error"),
    # it learned a little and stopped
    "partly learned": (chain(0.2, loss=np.where(STEPS < 20, 2.3 - 0.03 * STEPS, 1.7)), "warning"),
    # it learns although float32 can hardly resolve what arrives
    "hopeless, learning": (chain(0.35, loss=NETWORK["loss"].values), "warning"),
    "learning": (chain(0.2, loss=NETWORK["loss"].values), "info"),
    # one sum of two embeddings at the input makes no residual network
    "one addition": (chain(0.2, shortcuts=1), "error"),
}

STAYS_SILENT = {
    # critical weights: the signal arrives through all layers
    "critical": chain(0.0, alike=0.0),
    "critical, stuck for another reason": chain(0.02, alike=0.05),
    "residual": chain(0.2, shortcuts=12),
    "bottleneck": chain(0.2, shortcuts=8),
    "normalized": chain(0.2, norms=24),
    "shallow": chain(0.2, products=6),
    # rows that are alike do no harm where the loss falls
    "learning, alike": chain(0.0, loss=NETWORK["loss"].values),
    # what the graph looks like is not known
    "no graph": replace(chain(0.2), events=()),
}


@pytest.mark.parametrize("history, level", FIRES.values(), ids=FIRES)
def test_fires(history, level):
    """A long plain chain that loses the signal is found in the first reading, an alarm where the run suffers."""
    check_rule(DeepWithoutShortcuts, fires=[history], seeds=())
    (finding,) = DeepWithoutShortcuts().check(history)

    assert level == finding.level
    assert finding.first_step <= 4


@pytest.mark.parametrize("history", STAYS_SILENT.values(), ids=STAYS_SILENT)
def test_stays_silent(history):
    """Nothing is found where something carries the signal past the layers, or it needs no carrying."""
    assert [] == list(DeepWithoutShortcuts().check(history))


def test_scale_of_weights_is_blamed_first():
    """The rule is less certain where the weights start too small to begin with."""
    (critical,), (small,) = (list(DeepWithoutShortcuts().check(chain(0.2, weights=w))) for w in (1.0, 0.5))

    assert small.confidence < critical.confidence


def test_more_is_never_milder():
    """Losing more never lowers the level."""
    check_severity(DeepWithoutShortcuts, [chain(loss, alike=0.0) for loss in (0.0, 0.05, 0.15, 0.3, 1.0)])
