"""saturating-activations: when it is found, and when it is not."""

import numpy as np
import pytest

from isograd.rules.saturating_activations import SaturatingActivations
from isograd.testing import altered, check_rule, check_severity, plain_network

STUCK = 2.3 + 0.01 * np.sin(np.arange(100) * 1.7)


def tower(depth, *, slope=0.22, activation="sigmoid", loss=None):
    """Activations in series, each of which takes its slope from the signal; weights that keep it otherwise."""
    history = plain_network(depth=depth, activation=activation)
    layers_behind = np.array([depth - (layer.position - 1) / 2 for layer in history.layers])
    changed = altered(
        history,
        activation_slope=lambda v: np.where(np.isfinite(v), slope, v),
        signal_norm=lambda v: v * slope**layers_behind,
    )
    return changed if loss is None else altered(changed, loss=loss)


def pinned(share, *, activation="tanh", layer=2, loss=None):
    """One activation layer of four, a share of whose outputs is saturated."""
    changed = altered(
        plain_network(activation=activation),
        saturation=lambda v: np.where(np.arange(v.shape[1]) == layer, share, v),
    )
    return changed if loss is None else altered(changed, loss=loss)


FIRES = {
    # eight sigmoids, none of them saturated: 0.66 decades each
    "sigmoid tower": (tower(8, loss=STUCK), ("error", "act0")),
    # the same in a run that falls
    "tower that learns": (tower(8), ("info", "act0")),
    # inputs of order 500 drive the first tanh against its ends
    "first layer pinned": (pinned(0.99, loss=STUCK), ("error", "act0")),
    # pinned, and yet it learns
    "pinned and learning": (pinned(0.8), ("info", "act0")),
}

STAYS_SILENT = {
    "relu": plain_network(depth=8),
    "tanh": plain_network(depth=8, activation="tanh"),
    # two sigmoids lose little
    "shallow": tower(2, loss=STUCK),
    # tanh with small weights: the weights lose the signal, the slopes are near 1
    "weights to blame": altered(
        tower(10, activation="tanh", slope=0.98, loss=STUCK),
        signal_norm=lambda v: v * 0.3 ** (np.arange(24)[::-1] / 2),
    ),
    # the last activation is the output: a classifier that is sure
    "output": pinned(0.99, activation="sigmoid", layer=10, loss=STUCK),
    "a third": pinned(0.35, loss=STUCK),
}


@pytest.mark.parametrize("history, expected", FIRES.values(), ids=FIRES)
def test_fires(history, expected):
    """Towers and pinned layers are found, at their level, the first activation first."""
    check_rule(SaturatingActivations, fires=[history], seeds=())
    (finding,) = SaturatingActivations().check(history)

    assert expected == (finding.level, finding.layers[0])


@pytest.mark.parametrize("history", STAYS_SILENT.values(), ids=STAYS_SILENT)
def test_stays_silent(history):
    """Nothing is found where slopes are near one, few, or at the output."""
    assert [] == list(SaturatingActivations().check(history))


def test_what_the_activations_take_is_counted():
    """Eight activations of slope 0.22 take -8 log10 0.22 = 5.26 decades."""
    (finding,) = SaturatingActivations().check(tower(8, loss=STUCK))

    assert finding.evidence[0].observed == pytest.approx(-8 * np.log10(0.22), rel=1e-6)


def test_worse_is_never_milder():
    """A larger saturated share never lowers the level."""
    check_severity(SaturatingActivations, [pinned(share, loss=STUCK) for share in (0, 0.4, 0.6, 0.9, 1)])
