"""parameters-not-optimized: when it is found, and when it is not."""

from dataclasses import replace

import numpy as np
import pytest

from isograd._history import Event
from isograd.rules.parameters_not_optimized import ParametersNotOptimized
from isograd.testing import altered, check_rule, plain_network

STUCK = 0.66 + 0.01 * np.sin(np.arange(100) * 1.7)
HEAD = np.arange(10) == 8  # the last layer's weight among the parameters
FALLING = plain_network()["loss"].values


def loose(*names, loss=STUCK, later=None, **changes):
    """A network whose loss depends on parameters of these names that no optimizer holds; `later`: at step 50."""
    history = altered(plain_network(), loss=loss, **changes)
    told = [(0, names)] if later is None else [(0, names), (50, later)]
    facts = [Event(step=step, kind="loss-graph", data={"operations": [], "unoptimized": list(n)}) for step, n in told]
    return replace(history, events=tuple(facts))


FIRES = {
    # layers in a list: the rest learns what it can
    "unregistered": (loose("Linear.weight", "Linear.bias"), "error"),
    "part of the way": (loose("Linear.weight", loss=1.0 - 0.4 * (1 - np.exp(-np.arange(100) / 5))), "warning"),
    # the optimizer holds layers that were replaced
    "orphaned": (loose("Model.0.weight", grad_max=np.nan), "error"),
    "orphaned with zeros": (loose("Model.0.weight", grad_max=0.0, loss=2.2), "error"),
    # layers in a list, in a run that learns with the rest: never meant
    "unregistered, learning": (loose("Model.hidden[0].weight", "Model.head.weight", loss=FALLING), "warning"),
    "unregistered, stuck": (loose("Model.layers['a'].weight"), "error"),
    # a head replaced after the optimizer was made: it holds the old one, which nothing reaches
    "replaced": (loose("Model.head.weight", loss=FALLING, grad_max=lambda v: np.where(HEAD, np.nan, v)), "warning"),
    # worth knowing: features that are left out of the optimizer, under a head that learns
    "features": (loose("Model.body.weight", loss=FALLING), "info"),
}

STAYS_SILENT = {
    "plain": plain_network(),
    "all held": loose(),
    # the second optimizer was made after the first backward pass
    "held later": loose("Critic.weight", later=()),
}


@pytest.mark.parametrize("history, level", FIRES.values(), ids=FIRES)
def test_fires(history, level):
    """Parameters that nobody steps are found by name, as an alarm only where the run does not learn."""
    check_rule(ParametersNotOptimized, fires=[history], seeds=())
    (finding,) = ParametersNotOptimized().check(history)

    assert (level, 0) == (finding.level, finding.first_step)
    assert history.events[0].data["unoptimized"][0] in finding.message


@pytest.mark.parametrize("history", STAYS_SILENT.values(), ids=STAYS_SILENT)
def test_stays_silent(history):
    """Nothing is found where every parameter has an optimizer."""
    assert [] == list(ParametersNotOptimized().check(history))
