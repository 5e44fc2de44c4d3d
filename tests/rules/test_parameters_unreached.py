"""parameters-unreached: when it is found, and when it is not."""

from dataclasses import replace

import numpy as np
import pytest

from isograd.rules.parameters_unreached import ParametersUnreached
from isograd.testing import altered, check_rule, plain_network

STEPS = np.arange(100)
FLAT = 0.4 + 1.2 * np.exp(-STEPS / 5)


def absent(columns, *, value=np.nan, since=0, history=None):
    """A network some of whose parameters have this in place of a gradient from a step on."""
    return altered(
        history or plain_network(),
        grad_max=lambda v: np.where(
            (STEPS[: len(v)] >= since)[:, None] & np.isin(np.arange(v.shape[1]), columns), value, v
        ),
    )


def described(history, **changes):
    """The first layer's parameters described otherwise."""
    parameters = (replace(p, **changes) if p.layer == "linear0" else p for p in history.parameters)
    return replace(history, parameters=tuple(parameters))


def uncalled(history):
    """The first layer was never called."""
    layers = (replace(layer, position=np.inf) if layer.name == "linear0" else layer for layer in history.layers)
    return replace(history, layers=tuple(layers))


def padded(share, loss=FLAT):
    """A network into whose second layer samples come of which a share is all padding."""
    return altered(
        plain_network(), loss=loss, padding_fraction=lambda v: np.where(np.arange(v.shape[1]) == 1, share, np.nan)
    )


FIRES = {
    # the graph is cut behind the first layer
    "detached": (absent([0, 1]), "linear0.weight"),
    "in the middle": (absent([4, 5]), "linear2.weight"),
    # the first of five entities has the padding's number
    "padding": (padded(0.2), "linear0"),
}

STAYS_SILENT = {
    "plain": plain_network(),
    # no gradient exists at all: the whole loss is at fault
    "everything": absent(range(10)),
    # exactly zero is a gradient: units that are off, weights that are zero
    "zero": absent([0, 1], value=0.0),
    # experts that are idle for a while
    "at times": absent([0, 1], since=50),
    "frozen": described(absent([0, 1]), trainable=False),
    "not optimized": described(absent([0, 1]), optimized=False),
    # a layer that the program does not use
    "unused": uncalled(absent([0, 1])),
    "five steps": absent([0, 1], history=plain_network(steps=5)),
    # padding fills up sequences
    "no empty samples": padded(0.0),
    # an empty sample now and then, in a run that learns
    "learns": padded(0.2, loss=plain_network()["loss"].values),
}


@pytest.mark.parametrize("history, name", FIRES.values(), ids=FIRES)
def test_fires(history, name):
    """Parameters that no gradient reaches are warned of, by name."""
    check_rule(ParametersUnreached, fires=[history], seeds=())
    (finding,) = ParametersUnreached().check(history)

    assert ("warning", 0, name) == (finding.level, finding.first_step, finding.layers[0])


@pytest.mark.parametrize("history", STAYS_SILENT.values(), ids=STAYS_SILENT)
def test_stays_silent(history):
    """Nothing is found where a gradient arrived once, or none is meant to."""
    assert [] == list(ParametersUnreached().check(history))
