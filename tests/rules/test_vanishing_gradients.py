"""vanishing-gradients: when it is found, and when it is not."""

import numpy as np
import pytest

from isograd._history import Series
from isograd.rules.vanishing_gradients import VanishingGradients
from isograd.testing import altered, check_rule, check_severity, plain_network

STUCK = 2.3 + 0.01 * np.sin(np.arange(100) * 1.7)


def decaying(decades, *, depth=10, loss=None):
    """A network whose signal loses so many decades per layer from the loss to the input."""
    history = plain_network(depth=depth)
    factor = 10.0 ** (decades * np.array([layer.position - 2 * depth - 1 for layer in history.layers]) / 2)
    changed = altered(history, signal_norm=lambda values: values * factor)
    return changed if loss is None else altered(changed, loss=loss)


def without_signal(decades):
    """The same where only gradients of weights were read."""
    history = plain_network(depth=10)
    factor = 10.0 ** (decades * (np.arange(len(history.parameters)) // 2 - 10))
    changed = altered(history, grad_norm=lambda values: values * factor, loss=STUCK)
    object.__setattr__(changed, "series", {k: v for k, v in changed.series.items() if k != "signal_norm"})
    return changed


def through_time(decades):
    """A recurrent cell called 50 times in a step, whose signal loses so many decades back to the first."""
    history = altered(plain_network(depth=1), loss=STUCK)
    calls = np.tile(10.0 ** (decades * (np.arange(50) / 49 - 1)), (5, 1))
    object.__setattr__(history, "profiles", {"call_signal_norm": {"linear0": Series(np.arange(5), calls)}})
    return history


FIRES = {
    # 0.4 decades per layer, as ReLU loses with PyTorch's default initialization; nothing is learned
    "default initialization, stuck": (decaying(0.4, loss=STUCK), "warning", "linear0"),
    # 0.85 per layer, as sigmoid loses: 8.5 decades, beyond the resolution of float32
    "sigmoid tower, stuck": (decaying(0.85, loss=STUCK), "error", "linear0"),
    # beyond float32, although the layers near the loss learn by themselves
    "hopeless, but the loss falls": (decaying(0.85), "warning", "linear0"),
    # beyond `decades`, but it trains: worth a word, no alarm
    "deep and learning": (decaying(0.4), "info", "linear0"),
    # no hook on outputs: the gradients of the weights show it as well
    "seen in weights only": (without_signal(0.4), "warning", "linear0"),
    # back through 50 time steps instead of layers
    "through time": (through_time(8.0), "error", "linear0"),
}

STAYS_SILENT = {
    # the signal keeps its size
    "critical initialization": plain_network(depth=20),
    # all signals are tiny, and equally so: converged, or a loss in small units
    "tiny everywhere": altered(plain_network(depth=10), signal_norm=lambda values: values * 1e-12),
    # one decade over the whole network
    "mild": decaying(0.1, loss=STUCK),
    # a single layer with a small signal (a gated branch) is no slope
    "one odd layer": altered(plain_network(depth=10), signal_norm=lambda v: v * np.where(np.arange(24) == 5, 1e-9, 1)),
    # exact zeros at step 0, as residual branches scaled by zero have
    "zeros at the start": altered(plain_network(depth=10), signal_norm=lambda v: v * (np.arange(100) > 0)[:, None]),
    # the signal vanishes in one deep reading of a hundred
    "once": altered(
        plain_network(depth=10),
        signal_norm=lambda v: v * np.where(np.arange(100)[:, None] == 50, 10.0 ** -np.arange(24)[::-1], 1),
    ),
    # the mirror image
    "growing towards the input": decaying(-0.4, loss=STUCK),
    # through time, but within a decade
    "short memory": through_time(1.0),
}


@pytest.mark.parametrize("history, level, first", FIRES.values(), ids=FIRES)
def test_fires(history, level, first):
    """A signal that vanishes is found, at its level, and the layer nearest the input is named first."""
    check_rule(VanishingGradients, fires=[history], seeds=())
    (finding,) = VanishingGradients().check(history)

    assert (level, first) == (finding.level, finding.layers[0])


@pytest.mark.parametrize("history", STAYS_SILENT.values(), ids=STAYS_SILENT)
def test_stays_silent(history):
    """Nothing is found where the signal keeps its size over depth and time."""
    assert [] == list(VanishingGradients().check(history))


def test_decades_are_counted():
    """The evidence is the number of decades that were lost: 0.4 in each of 10 steps from layer to layer."""
    (finding,) = VanishingGradients().check(decaying(0.4))

    assert finding.evidence[0].observed == pytest.approx(4.0, abs=0.1)


def test_worse_is_never_milder():
    """A steeper slope never lowers the level."""
    check_severity(VanishingGradients, [decaying(d, loss=STUCK) for d in (0.0, 0.2, 0.35, 0.6, 0.75, 1.5)])
