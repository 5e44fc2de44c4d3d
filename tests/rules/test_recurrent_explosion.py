"""recurrent-explosion: when it is found, and when it is not."""

from dataclasses import replace

import numpy as np
import pytest

from isograd._history import Series
from isograd.rules.recurrent_explosion import RecurrentExplosion
from isograd.testing import altered, check_rule, plain_network

STEPS = np.arange(100)
FALLING = plain_network()["loss"].values
BLOWN = np.where(STEPS < 60, FALLING, 50.0)


def recurrent(decades, *, calls=40, loss=BLOWN, until=100):
    """A network with a cell whose signal loses so many decades from the last call back to the first, up to a step."""
    lost = np.where(STEPS < until, decades, 0.0)
    signal = 10.0 ** (lost[:, None] * np.linspace(-1, 0, calls))
    history = altered(plain_network(), loss=loss)
    return replace(history, profiles={"call_signal_norm": {"linear0": Series(STEPS, signal)}})


def unasked(history, *, last):
    """The same, with no signal at all in its last calls."""
    series = history.profiles["call_signal_norm"]["linear0"]
    signal = np.where(np.arange(series.values.shape[1]) < series.values.shape[1] - last, series.values, 0.0)
    return replace(history, profiles={"call_signal_norm": {"linear0": Series(series.steps, signal)}})


FIRES = {
    "three decades": (recurrent(-3.0), "error"),
    "just beyond": (recurrent(-1.1), "error"),
    # the loss was lost
    "not finite": (
        altered(
            recurrent(-3.0, loss=np.where(STEPS < 60, FALLING, np.nan)), loss_nonfinite=(STEPS >= 60).astype(float)
        ),
        "error",
    ),
    # it came back
    "spike": (recurrent(-3.0, loss=np.where(STEPS == 60, 50.0, FALLING)), "warning"),
}

STAYS_SILENT = {
    "plain": plain_network(),
    # clipped, and learning
    "learns": recurrent(-3.0, loss=FALLING),
    # the loss rises for another reason
    "vanishing": recurrent(3.0),
    # a policy called at every step of an episode; its loss swings about zero
    "about zero": recurrent(-3.0, loss=np.where(STEPS < 5, -0.002, 0.02 * np.sin(STEPS / 8))),
    "keeps its signal": recurrent(-0.4),
    # the loss does not ask the last thirty calls at all: their zeros are no small signal that grew
    "last calls unused": unasked(recurrent(-0.4), last=30),
    "shared": recurrent(-3.0, calls=4),
}


@pytest.mark.parametrize("history, level", FIRES.values(), ids=FIRES)
def test_fires(history, level):
    """A signal that grows through time before the loss leaves its range is found."""
    check_rule(RecurrentExplosion, fires=[history], seeds=())
    (finding,) = RecurrentExplosion().check(history)

    assert (level, ("linear0",)) == (finding.level, finding.layers)


@pytest.mark.parametrize("history", STAYS_SILENT.values(), ids=STAYS_SILENT)
def test_stays_silent(history):
    """Nothing is found where the loss stays, or the signal does not grow."""
    assert [] == list(RecurrentExplosion().check(history))
