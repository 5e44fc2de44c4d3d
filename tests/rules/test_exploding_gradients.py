"""exploding-gradients: when it is found, and when it is not."""

import numpy as np
import pytest

from isograd.rules.exploding_gradients import ExplodingGradients
from isograd.testing import altered, check_rule, check_severity, plain_network

STEPS = np.arange(100)
STUCK = 2.3 + 0.01 * np.sin(STEPS * 1.7)


def growing(decades, *, loss=None):
    """A network of 11 layers whose signal gains so many decades per layer from the loss to the input."""
    history = plain_network(depth=10)
    factor = 10.0 ** (decades * np.array([21 - layer.position for layer in history.layers]) / 2)
    changed = altered(history, signal_norm=lambda values: values * factor)
    return changed if loss is None else altered(changed, loss=loss)


def in_time(decades, *, loss=None):
    """A network whose gradient norm grows by so many decades over the run."""
    changed = altered(plain_network(), global_grad_norm_unclipped=10.0 ** (decades * STEPS / 99))
    return changed if loss is None else altered(changed, loss=loss)


def overflown():
    """Entries of 1e20 are finite; their sum of squares is not."""
    column = np.arange(10) == 0
    return altered(
        plain_network(),
        grad_max=lambda v: np.where(column, 1e20, v),
        grad_norm=lambda v: np.where(column, np.inf, v),
    )


FIRES = {
    # 0.4 decades per layer over 10 layers, and nothing is learned
    "over depth, stuck": (growing(0.4, loss=STUCK), "warning", ("linear0", 0)),
    # the same in a network that trains
    "over depth, learning": (growing(0.4), "info", ("linear0", 0)),
    # gradients pile up from step to step while the loss rises: a hundredfold of it
    "in time, diverging": (in_time(3, loss=2.3 * 1.05**STEPS), "warning", (None, 54)),
    # gradients grow, but the loss falls
    "in time, learning": (in_time(2.1), "info", (None, 76)),
    # the norm has left float32
    "overflow": (overflown(), "error", ("linear0.weight", 0)),
}

STAYS_SILENT = {
    "plain": plain_network(depth=20),
    # converging: the gradient shrinks
    "shrinking": altered(plain_network(), global_grad_norm_unclipped=10.0 ** (-STEPS / 30)),
    # one spike of the norm that comes back
    "spike": altered(plain_network(), global_grad_norm_unclipped=np.where(STEPS == 60, 1e4, 1.0)),
    # large in the first step only, as with targets far from zero
    "first step": altered(plain_network(), global_grad_norm_unclipped=np.where(STEPS == 0, 1e4, 1.0)),
    # the signal vanishes instead
    "vanishing": growing(-0.4, loss=STUCK),
    # a healthy loss becomes ten times as sharp
    "sharper": in_time(1.0),
}


@pytest.mark.parametrize("history, level, where", FIRES.values(), ids=FIRES)
def test_fires(history, level, where):
    """Growth over depth, growth in time and overflow are found, at their level, in their place and from their step."""
    check_rule(ExplodingGradients, fires=[history], seeds=())
    (finding,) = ExplodingGradients().check(history)

    assert (level, where) == (finding.level, (next(iter(finding.layers), None), finding.first_step))


@pytest.mark.parametrize("history", STAYS_SILENT.values(), ids=STAYS_SILENT)
def test_stays_silent(history):
    """Nothing is found where gradients shrink, spike once or grow as a sharper loss makes them."""
    assert [] == list(ExplodingGradients().check(history))


def test_worse_is_never_milder():
    """A steeper slope over depth never lowers the level."""
    check_severity(ExplodingGradients, [growing(d, loss=STUCK) for d in (0.0, 0.2, 0.35, 0.6, 1.5)])
