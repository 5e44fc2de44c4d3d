"""hidden-state-not-detached: when it is found, and when it is not."""

from dataclasses import replace

import numpy as np
import pytest

from isograd._history import Event
from isograd.rules.hidden_state_not_detached import HiddenStateNotDetached
from isograd.testing import altered, check_rule, check_severity, plain_network

STEPS = np.arange(100)
AGAIN = "Trying to backward through the graph a second time (or directly access saved tensors after …)."
INPLACE = "one of the variables needed for gradient computation has been modified by an inplace operation: …"


def graph(nodes, *, steps=100):
    """A network with a graph of so many nodes."""
    return altered(plain_network(steps=steps), graph_nodes=nodes)


def ended(history, message, *, kind="RuntimeError"):
    """The same, ended by an exception."""
    event = Event(step=history.num_steps - 1, kind="exception", data={"type": kind, "message": message})
    return replace(history, events=(event,))


FIRES = {
    # everything is carried
    "whole graph": (graph(50 * (1 + STEPS)), "warning", 0),
    # only the state's own part is, beside a large head
    "small part": (graph(400 + 60 * STEPS), "warning", 0),
    # the observer stops counting
    "counted up to 20000": (graph(np.minimum(900 * (1 + STEPS), 20000)), "warning", 0),
    # read on a schedule
    "read now and then": (graph(np.where(STEPS % 9 == 0, 50 * (1 + STEPS), np.nan)), "warning", 0),
    # torch refuses the second step
    "refused": (ended(graph(50, steps=1), AGAIN), "error", 0),
    "refused, weights changed": (ended(graph(50 * (1 + np.arange(3)), steps=3), INPLACE), "error", 2),
    "grown, then refused": (ended(graph(50 * (1 + np.arange(8)), steps=8), AGAIN), "error", 0),
}

STAYS_SILENT = {
    "not read": graph(np.nan),
    "constant": graph(500),
    # sequences of different lengths
    "lengths": graph(100 + 300 * (STEPS * 37 % 11)),
    # a curriculum: longer and longer, but not by a tenth with each step
    "curriculum": graph(500 + 5 * STEPS),
    # truncated backpropagation through time: cut every 8 steps
    "truncated": graph(50 * (1 + STEPS % 8)),
    # two long sequences in a row at the end of the readings
    "short": graph(np.array([50, 50, 90]), steps=3),
    # the same words in the first step mean two passes over one loss, or a change in place
    "in place, at once": ended(graph(50, steps=1), INPLACE),
    # another end
    "other exception": ended(graph(50, steps=3), "mat1 and mat2 shapes cannot be multiplied"),
}


@pytest.mark.parametrize("history, level, step", FIRES.values(), ids=FIRES)
def test_fires(history, level, step):
    """A graph that grows with every step is found, and torch's refusal to go back through an earlier one."""
    check_rule(HiddenStateNotDetached, fires=[history], seeds=())
    (finding,) = HiddenStateNotDetached().check(history)

    assert (level, step) == (finding.level, finding.first_step)


@pytest.mark.parametrize("history", STAYS_SILENT.values(), ids=STAYS_SILENT)
def test_stays_silent(history):
    """Nothing is found where the graph keeps its size, varies with the data, or is cut."""
    assert [] == list(HiddenStateNotDetached().check(history))


def test_faster_is_never_milder():
    """Faster growth never lowers the level."""
    check_severity(HiddenStateNotDetached, [graph(100 + rate * STEPS) for rate in (0, 5, 15, 100, 400)])
