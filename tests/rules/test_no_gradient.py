"""no-gradient: when it is found, and when it is not."""

from dataclasses import replace

import numpy as np
import pytest

from isograd.rules.no_gradient import NoGradient
from isograd.testing import altered, check_rule, plain_network

STEPS = np.arange(100)
STUCK = 2.3 + 0.01 * np.sin(STEPS * 1.7)
EMPTY = np.nan


def silent(columns, value=0.0, *, since=0, history=None):
    """A network some of whose parameters get `value` as their gradient from a step on."""
    rows = (STEPS >= since)[:, None]
    return altered(
        history or plain_network(),
        grad_max=lambda v: np.where(rows & np.isin(np.arange(v.shape[1]), columns), value, v),
    )


def described(history, **changes):
    """The first layer's parameters described otherwise."""
    return replace(
        history, parameters=tuple(replace(p, **changes) if p.layer == "linear0" else p for p in history.parameters)
    )


def never_called(history):
    """The first layer was never called."""
    layers = (replace(layer, position=np.inf) if layer.name == "linear0" else layer for layer in history.layers)
    return replace(history, layers=tuple(layers))


EVERYTHING = list(range(10))

FIRES = {
    # a loss whose derivative is zero: nothing at all moves
    "everything zero": (silent(EVERYTHING), ("error", "linear0.weight", 0)),
    # the graph is cut before the first layer, which was called
    "detached": (silent([0, 1], EMPTY), ("warning", "linear0.weight", 0)),
    # a layer in the optimizer that the program never calls
    "unused": (never_called(silent([0, 1], EMPTY)), ("info", "linear0.weight", 0)),
    # all units died at step 40
    "died": (altered(silent(EVERYTHING, since=40), loss=STUCK), ("error", None, 40)),
}

STAYS_SILENT = {
    "plain": plain_network(),
    # residual branches that start at zero get a gradient from the second step on
    "zero at the start": altered(plain_network(), grad_max=lambda v: np.where((STEPS == 0)[:, None], 0.0, v)),
    # an expert that is idle in most batches
    "idle expert": altered(plain_network(), grad_max=lambda v: v * ((STEPS % 7 == 0)[:, None] | (np.arange(10) > 1))),
    # frozen, or left out of the optimizer, on purpose
    "frozen": described(silent([0, 1], EMPTY), trainable=False),
    "not optimized": described(silent([0, 1], EMPTY), optimized=False),
    # solved: the loss has fallen to where its derivative is exactly zero
    "converged": silent(EVERYTHING, since=80),
    # a gradient that is NaN is none of this rule's business
    "not finite": altered(silent([0], EMPTY), grad_nonfinite=lambda v: v + (np.arange(10) == 0)),
    # too few steps to blame a part of the model
    "five steps": altered(plain_network(steps=5), grad_max=lambda v: v * (np.arange(10) > 1)),
}


@pytest.mark.parametrize("history, expected", FIRES.values(), ids=FIRES)
def test_fires(history, expected):
    """Parameters without a gradient are found, at their level, by name and from their step."""
    check_rule(NoGradient, fires=[history], seeds=())
    (finding,) = NoGradient().check(history)

    assert expected == (finding.level, next(iter(finding.layers), None), finding.first_step)


@pytest.mark.parametrize("history", STAYS_SILENT.values(), ids=STAYS_SILENT)
def test_stays_silent(history):
    """Nothing is found where a gradient arrived at any step, or where none is meant to."""
    assert [] == list(NoGradient().check(history))


def test_all_silent_parameters_are_named():
    """Every parameter without a gradient is named, and no other."""
    (finding,) = NoGradient().check(silent([2, 3, 6]))

    assert ("linear1.weight", "linear1.bias", "linear3.weight") == finding.layers
