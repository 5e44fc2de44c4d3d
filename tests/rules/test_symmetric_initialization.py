"""symmetric-initialization: when it is found, and when it is not."""

from dataclasses import replace

import numpy as np
import pytest

from isograd.rules.symmetric_initialization import SymmetricInitialization
from isograd.testing import altered, check_rule, check_severity, plain_network

STEPS = np.arange(100)
STUCK = 1.38 + 0.01 * np.sin(STEPS * 1.7)
FIRST, SECOND, HEAD = 0, 2, 8  # columns of the weights of a network of four hidden layers


def alike(*columns, spread=0.0, loss=None, moved=1e-3, **changes):
    """A network of whose weights some have units that differ by so much, a number or one for each reading."""
    history = altered(
        plain_network(),
        unit_spread=lambda v: np.where(np.isin(np.arange(v.shape[1]), columns), np.reshape(spread, (-1, 1)), 1.0),
        update_ratio=moved,
        **changes,
    )
    return history if loss is None else altered(history, loss=loss)


def frozen(history, column):
    """One of the parameters is not trained."""
    parameters = list(history.parameters)
    parameters[column] = replace(parameters[column], trainable=False)
    return replace(history, parameters=tuple(parameters))


def loose(history):
    """The first weight belongs to no layer with units of its own: a table in a module of the user's."""
    layers = [replace(layer, kind="other") if layer.name == "linear0" else layer for layer in history.layers]
    return replace(history, layers=tuple(layers))


FIRES = {
    # constant weights: one layer of identical units, nothing learned
    "constant": (alike(FIRST, SECOND, loss=STUCK), ("error", 0, "linear0.weight")),
    # the loss falls: one unit can do much
    "learns": (alike(SECOND), ("warning", 0, "linear1.weight")),
    # sums in different orders round differently
    "rounding": (alike(FIRST, spread=2e-7, loss=STUCK), ("error", 0, "linear0.weight")),
    # zeros have no units; they become alike with the first update
    "from zero": (alike(FIRST, spread=np.where(STEPS < 1, np.nan, 0.0)), ("warning", 1, "linear0.weight")),
    # gates get gradients of their own, the units of each gate do not
    "part slowly": (alike(FIRST, SECOND, spread=STEPS * 0.01, loss=STUCK), ("error", 0, "linear0.weight")),
    "no layer's own, stuck": (loose(alike(FIRST, loss=STUCK)), ("error", 0, "linear0.weight")),
}

STAYS_SILENT = {
    "plain": plain_network(),
    "drawn": alike(),
    # a classifier that starts at zero parts at the first step
    "head": alike(HEAD, spread=np.where(STEPS < 1, np.nan, 0.9)),
    # a gain per channel that starts at a constant parts slowly, as far as it moves
    "one constant": alike(FIRST, spread=1e-3 * STEPS, loss=STUCK),
    # nothing has moved yet
    "rate of zero": alike(FIRST, moved=0.0),
    "too little movement": alike(FIRST, moved=1e-7),
    # no gradient: decay alone moves it, and another rule speaks
    "unused": alike(FIRST, grad_max=0.0),
    "frozen": frozen(alike(FIRST), FIRST),
    # the rows of a table that a formula averages, in a run that learns
    "averaged": loose(alike(FIRST)),
}


@pytest.mark.parametrize("history, expected", FIRES.values(), ids=FIRES)
def test_fires(history, expected):
    """Identical units are found from the first reading on, at a level that depends on the harm."""
    check_rule(SymmetricInitialization, fires=[history], seeds=())
    (finding,) = SymmetricInitialization().check(history)

    assert expected == (finding.level, finding.first_step, finding.layers[0])


@pytest.mark.parametrize("history", STAYS_SILENT.values(), ids=STAYS_SILENT)
def test_stays_silent(history):
    """Nothing is found where units part, do not train, or have not moved."""
    assert [] == list(SymmetricInitialization().check(history))


def test_worse_is_never_milder():
    """Units that are more alike never lower the level."""
    check_severity(SymmetricInitialization, [alike(FIRST, spread=s, loss=STUCK) for s in (1, 0.1, 1e-4, 0)])
