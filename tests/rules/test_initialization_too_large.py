"""initialization-too-large: when it is found, and when it is not."""

from dataclasses import replace

import numpy as np
import pytest

from isograd.rules.initialization_too_large import InitializationTooLarge
from isograd.testing import altered, check_rule, check_severity, plain_network

STUCK = 2.3 + 0.01 * np.sin(np.arange(100) * 1.7)


def scaled(factor, *, depth=10, loss=STUCK, growth=None):
    """Weights at `factor` times the critical scale, outputs and signals that grow by `growth` (or that) per layer."""
    history = plain_network(depth=depth)
    ahead = np.array([layer.position / 2 for layer in history.layers])
    grown = factor if growth is None else growth
    return altered(
        history,
        weight_norm=lambda v: v * factor,
        output_rms=lambda v: v * grown**ahead,
        signal_norm=lambda v: v * grown ** (depth - ahead),
        loss=history["loss"].values if loss is None else loss,
    )


def normalized(history):
    """The same with a normalization in place of one activation."""
    layers = tuple(replace(layer, kind="layer-norm") if layer.name == "act3" else layer for layer in history.layers)
    return replace(history, layers=layers)


FIRES = {
    # weights of standard deviation 1 in layers of 64: 5.7 times the critical scale
    "standard normal": (scaled(5.7), "error"),
    # it survives its start
    "learning": (scaled(5.7, loss=None), "info"),
    # twice, over 10 layers: three decades
    "twice": (scaled(2.0), "error"),
}

STAYS_SILENT = {
    "critical": scaled(1.0),
    # 5/3 where tanh needs 1 is common in shallow networks
    "shallow": scaled(1.7, depth=3),
    "normalized": normalized(scaled(5.7)),
    # large weights whose outputs do not grow: something scales them down
    "scaled down": scaled(2.0, growth=1.0),
    # too small instead
    "small": scaled(0.3),
}


@pytest.mark.parametrize("history, level", FIRES.values(), ids=FIRES)
def test_fires(history, level):
    """Weights above the critical scale under which values grow over depth are found, at their level."""
    check_rule(InitializationTooLarge, fires=[history], seeds=())
    (finding,) = InitializationTooLarge().check(history)

    assert level == finding.level


@pytest.mark.parametrize("history", STAYS_SILENT.values(), ids=STAYS_SILENT)
def test_stays_silent(history):
    """Nothing is found where values keep their size over depth."""
    assert [] == list(InitializationTooLarge().check(history))


def test_worse_is_never_milder():
    """Larger weights never lower the level."""
    check_severity(InitializationTooLarge, [scaled(f) for f in (1.0, 1.2, 1.6, 3.0, 10.0)])
