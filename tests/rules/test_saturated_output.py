"""saturated-output: when it is found, and when it is not."""

from dataclasses import replace

import numpy as np
import pytest

from isograd._history import Event
from isograd.rules.saturated_output import SaturatedOutput
from isograd.testing import altered, check_rule, check_severity, plain_network

STEPS = np.arange(100)
OUTPUT = 8  # the last activation, which stands behind the last layer with weights here
SOFTMAX = ("Neg", "Mean", "Gather", "Log", "Clamp", "Softmax", "Addmm")
SIGMOID = ("BinaryCrossEntropy", "Sigmoid", "Addmm")


def stuck_at(level):
    """A loss that stays at a level."""
    return level + 0.01 * level * np.sin(STEPS * 1.7)


def network(pinned, *, kind="sigmoid", operations=SIGMOID, loss=None, flat=0.0, units=4):
    """A network whose output has this share of its probabilities at 0 or 1, one number or one for each reading."""
    at = np.arange(12) == OUTPUT
    share = np.reshape(pinned, (-1, 1))
    history = altered(
        plain_network(activation=kind if kind == "sigmoid" else "relu"),
        loss=stuck_at(7.0) if loss is None else loss,
        saturation=lambda v: np.where(at & (kind == "sigmoid"), share, v),
        # of K probabilities one is 1: both means are 1 / K, and their quotient is the share that is pinned
        output_mean=lambda v: np.where(at, 0.25, v),
        output_rms=lambda v: np.where(at, np.sqrt(0.25 * share), v),
    )
    layers = list(history.layers)
    head, last = layers[9], layers[OUTPUT]
    layers[9], layers[OUTPUT] = replace(head, position=8), replace(last, position=9, kind=kind, units=units)
    event = Event(step=0, kind="loss-graph", data={"operations": list(operations), "flat_share": flat})
    return replace(history, layers=tuple(layers), events=(event,))


FIRES = {
    # half of the answers are wrong and certain
    "sigmoid": (network(0.99), 0),
    "softmax": (network(0.97, kind="softmax", operations=SOFTMAX), 0),
    # an update has thrown the scores out
    "since": (network(np.where(STEPS < 30, 0.1, 1.0)), 30),
    # a functional softmax is no layer; the clamp behind it tells
    "clamped": (network(0.0, kind="relu", operations=SOFTMAX, flat=0.95), 0),
}

STAYS_SILENT = {
    "plain": plain_network(),
    # certain and right: a converged classifier that is trained on
    "right": network(0.99, loss=stuck_at(0.01)),
    # noise as labels: nobody is certain
    "in the middle": network(0.02, loss=stuck_at(0.6933)),
    "learns": network(0.99, loss=7 * np.exp(-STEPS / 10) + 0.01),
    # scores enter the loss: wrong answers have their full gradient
    "scores": network(0.99, operations=("BinaryCrossEntropyWithLogits", "Addmm")),
    "log-softmax": network(0.99, kind="softmax", operations=("NllLoss", "LogSoftmax", "Addmm")),
    # a sigmoid inside, a regression outside
    "no logarithm": network(0.99, operations=("MseLoss", "Sigmoid", "Addmm")),
    # a likelihood whose scale is a sigmoid's
    "hidden": network(0.99, operations=("Log", "Addmm", "Sigmoid")),
}


@pytest.mark.parametrize("history, step", FIRES.values(), ids=FIRES)
def test_fires(history, step):
    """Wrong answers pinned at an end are an error since they are."""
    check_rule(SaturatedOutput, fires=[history], seeds=(), factors=())
    (finding,) = SaturatedOutput().check(history)

    assert ("error", step) == (finding.level, finding.first_step)


@pytest.mark.parametrize("history", STAYS_SILENT.values(), ids=STAYS_SILENT)
def test_stays_silent(history):
    """Nothing is found where answers are right, uncertain, or keep their gradient."""
    assert [] == list(SaturatedOutput().check(history))


def test_worse_is_never_milder():
    """A larger pinned share never lowers the level."""
    check_severity(SaturatedOutput, [network(share) for share in (0, 0.4, 0.6, 1)])
