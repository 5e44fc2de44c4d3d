"""initialization-too-small: when it is found, and when it is not."""

from dataclasses import replace

import numpy as np
import pytest

from isograd.rules.initialization_too_small import InitializationTooSmall
from isograd.testing import altered, check_rule, check_severity, plain_network

STUCK = 2.3 + 0.01 * np.sin(np.arange(100) * 1.7)


def scaled(factor, *, depth=12, activation="relu", loss=STUCK, signal=None):
    """Weights at `factor` of the critical scale of ReLU, and a signal that changes by `signal` (or that) per layer."""
    history = plain_network(depth=depth, activation=activation)
    behind = np.array([(2 * depth + 1 - layer.position) / 2 for layer in history.layers])
    return altered(
        history,
        weight_norm=lambda v: v * factor,
        signal_norm=lambda v: v * (factor if signal is None else signal) ** behind,
        loss=history["loss"].values if loss is None else loss,
    )


def normalized(history):
    """The same with a normalization in place of one activation."""
    layers = tuple(replace(layer, kind="batch-norm") if layer.name == "act3" else layer for layer in history.layers)
    return replace(history, layers=layers)


DEFAULT = 1 / 6**0.5  # PyTorch's default: variance 1/3 where ReLU needs 2

FIRES = {
    # a plain 13-layer ReLU network with PyTorch's default initialization
    "default, stuck": (scaled(DEFAULT), "error"),
    # adaptive optimizers cope with 4.7 decades
    "default, learning": (scaled(DEFAULT, loss=None), "info"),
    # 8 decades: beyond float32
    "deeper, learning": (scaled(DEFAULT, depth=21, loss=None), "warning"),
    # tanh is critical at sqrt(1/2) of ReLU's scale and a little above; a quarter of that is too small
    "tanh": (scaled(0.2, activation="tanh"), "error"),
}

STAYS_SILENT = {
    "critical": scaled(1.0),
    # four layers lose 1.6 decades
    "shallow": scaled(DEFAULT, depth=4),
    # small weights, but shortcuts carry the signal
    "shortcuts": scaled(DEFAULT, signal=1.0),
    # small weights and a normalization that makes up for them
    "normalized": normalized(scaled(DEFAULT)),
    # the signal is lost, but not by the weights
    "not the weights": scaled(1.0, signal=0.4),
    # a sigmoid tower: its slope is to blame
    "sigmoid": scaled(DEFAULT, activation="sigmoid", signal=0.14),
    "two layers": plain_network(depth=1),
}


@pytest.mark.parametrize("history, level", FIRES.values(), ids=FIRES)
def test_fires(history, level):
    """Weights below the critical scale that lose the signal are found, at their level."""
    check_rule(InitializationTooSmall, fires=[history], seeds=())
    (finding,) = InitializationTooSmall().check(history)

    assert level == finding.level


@pytest.mark.parametrize("history", STAYS_SILENT.values(), ids=STAYS_SILENT)
def test_stays_silent(history):
    """Nothing is found where the signal arrives, or is lost by something else than the weights' scale."""
    assert [] == list(InitializationTooSmall().check(history))


def test_scale_is_measured_against_the_critical_one():
    """PyTorch's default is found at sqrt(1/6) = 0.41 of the critical scale of ReLU."""
    (finding,) = InitializationTooSmall().check(scaled(DEFAULT))

    # The network's own weights are exactly critical, so the factor is found again.
    assert finding.evidence[0].observed == pytest.approx(DEFAULT, rel=1e-6)


def test_worse_is_never_milder():
    """Smaller weights never lower the level."""
    check_severity(InitializationTooSmall, [scaled(f) for f in (1.0, 0.7, 0.5, 0.3, 0.05)])
