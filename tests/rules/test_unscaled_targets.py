"""unscaled-targets: when it is found, and when it is not."""

from dataclasses import replace

import numpy as np
import pytest

from isograd._history import Event
from isograd.rules.unscaled_targets import UnscaledTargets
from isograd.testing import altered, check_rule, plain_network

STEPS = np.arange(100)
PREDICTION, TARGET = 10, 11


def regression(size, answer, *, loss=None, output="Addmm", dtype="float32", **changes):
    """Targets and answers of these root mean squares, by default in a run whose loss stays."""
    history = altered(
        plain_network(),
        loss=size**2 + 0.001 * size**2 * np.sin(STEPS * 1.7) if loss is None else loss,
        output_rms=lambda v: np.where(
            np.arange(v.shape[1]) == TARGET, size, np.where(np.arange(v.shape[1]) == PREDICTION, answer, v)
        ),
        **changes,
    )
    layers = list(history.layers)
    layers[TARGET] = replace(layers[TARGET], type=dtype)
    event = Event(step=0, kind="loss-graph", data={"operations": ["MseLoss", output, "Addmm"]})
    return replace(history, layers=tuple(layers), events=(event,))


NOT_FINITE = {"loss": np.where(STEPS < 3, 1e7, np.nan), "loss_nonfinite": (STEPS >= 3).astype(float)}

FIRES = {
    "thousands": regression(5000.0, 3.0),
    "just beyond": regression(12.0, 1.0),
    # squared errors of prices in the first step
    "broke": regression(3000.0, 1.0, **NOT_FINITE),
}

STAYS_SILENT = {
    "plain": plain_network(),
    "standardized": regression(1.0, 0.1),
    # an offset of 50 that is learned
    "learned": regression(50.0, 50.0, loss=2500 * np.exp(-STEPS / 10) + 1),
    # answers are there, and something else is wrong
    "reached": regression(50.0, 49.0),
    # steps that could get anywhere
    "large steps": regression(50.0, 3.0, update_ratio=0.3),
    "moderate and broken": regression(30.0, 1.0, **NOT_FINITE),
    # a sigmoid in between is the cause
    "bounded": regression(50.0, 0.9, output="Sigmoid"),
    # class numbers
    "labels": regression(300.0, 1.0, dtype="int64"),
}


@pytest.mark.parametrize("history", FIRES.values(), ids=FIRES)
def test_fires(history):
    """Targets that the answers never reach are an error from the first step."""
    check_rule(UnscaledTargets, fires=[history], seeds=())
    (finding,) = UnscaledTargets().check(history)

    assert ("error", 0, ("target",)) == (finding.level, finding.first_step, finding.layers)


@pytest.mark.parametrize("history", STAYS_SILENT.values(), ids=STAYS_SILENT)
def test_stays_silent(history):
    """Nothing is found where targets are ordinary or reached, or something else keeps answers from them."""
    assert [] == list(UnscaledTargets().check(history))
