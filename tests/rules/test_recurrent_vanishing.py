"""recurrent-vanishing: when it is found, and when it is not."""

from dataclasses import replace

import numpy as np
import pytest

from isograd._history import Series
from isograd.rules.recurrent_vanishing import RecurrentVanishing
from isograd.testing import altered, check_rule, plain_network

STEPS = np.arange(100)
STUCK = 1.39 + 0.01 * np.sin(STEPS * 1.7)
UNDERFLOWN = np.where(np.arange(40) < 10, 0.0, 10.0 ** np.linspace(-60, 0, 40))


def recurrent(decades, *, calls=40, loss=STUCK, until=100):
    """A network with a cell whose signal loses so many decades from the last call back to the first, up to a step."""
    lost = np.where(STEPS < until, decades, 0.0)
    signal = 10.0 ** (lost[:, None] * np.linspace(-1, 0, calls))
    history = altered(plain_network(), loss=loss)
    return replace(history, profiles={"call_signal_norm": {"linear0": Series(STEPS, signal)}})


FIRES = {
    "seven decades": recurrent(7.0),
    # the first calls have underflown to exactly zero
    "underflown": replace(
        recurrent(60.0), profiles={"call_signal_norm": {"linear0": Series(STEPS, np.tile(UNDERFLOWN, (100, 1)))}}
    ),
    "just beyond": recurrent(3.1),
}

STAYS_SILENT = {
    "plain": plain_network(),
    # the task needs the recent past only
    "learns": recurrent(9.0, loss=plain_network()["loss"].values),
    "keeps its signal": recurrent(1.0),
    # it found a way out
    "at the start only": recurrent(7.0, until=30),
    # a layer used in four places
    "shared": recurrent(7.0, calls=4),
    "exploding": recurrent(-7.0),
}


@pytest.mark.parametrize("history", FIRES.values(), ids=FIRES)
def test_fires(history):
    """A signal that dies out through time in a run that is stuck is an error from the first step."""
    check_rule(RecurrentVanishing, fires=[history], seeds=())
    (finding,) = RecurrentVanishing().check(history)

    assert ("error", 0, ("linear0",)) == (finding.level, finding.first_step, finding.layers)


@pytest.mark.parametrize("history", STAYS_SILENT.values(), ids=STAYS_SILENT)
def test_stays_silent(history):
    """Nothing is found where the run learns or the signal arrives."""
    assert [] == list(RecurrentVanishing().check(history))
