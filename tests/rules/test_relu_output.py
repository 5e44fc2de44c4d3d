"""relu-output: when it is found, and when it is not."""

from dataclasses import replace

import numpy as np
import pytest

from isograd._history import Event
from isograd.rules.relu_output import ReluOutput
from isograd.testing import altered, check_rule, plain_network

STEPS = np.arange(100)
STUCK = 2.3 + 0.01 * np.sin(STEPS * 1.7)
OUTPUT, TARGET = 8, 11  # columns: the last activation of a network of four, which stands behind its last layer here


def network(
    *, zeros=0.5, since=0, loss=STUCK, operations=("NllLoss", "LogSoftmax", "Relu", "Addmm"), targets=None, units=10
):
    """A network that ends in a ReLU of which a share is zero from a step on; `targets` are (mean, spread)."""
    history = altered(
        plain_network(),
        loss=loss,
        output_zero_fraction=lambda v: np.where(
            (np.arange(v.shape[1]) == OUTPUT) & (STEPS >= since)[:, None], zeros, np.minimum(v, 0.5)
        ),
    )
    if targets is not None:
        history = altered(
            history,
            output_mean=lambda v: np.where(np.arange(v.shape[1]) == TARGET, targets[0], v),
            output_std=lambda v: np.where(np.arange(v.shape[1]) == TARGET, targets[1], v),
        )
    layers = list(history.layers)
    head, last = layers[9], layers[OUTPUT]
    layers[9], layers[OUTPUT] = replace(head, position=8), replace(last, position=9, units=units)
    layers[TARGET] = replace(layers[TARGET], type="int64" if targets is None else "float32")
    event = Event(step=0, kind="loss-graph", data={"operations": list(operations)})
    return replace(history, layers=tuple(layers), events=(event,))


FIRES = {
    # all scores are zero from step 40 on
    "died": (network(zeros=1.0, since=40), ("error", 40)),
    "dead from the start": (network(zeros=0.95), ("error", 0)),
    # one of two scores in five examples of six, none in the others
    "two scores": (network(zeros=0.8, units=2), ("error", 0)),
    "one value": (network(zeros=0.8, units=1, operations=("MseLoss", "Relu", "Addmm")), ("error", 0)),
    # a regression on targets of both signs
    "negative targets": (
        network(targets=(0.0, 1.0), operations=("MseLoss", "Relu", "Addmm"), loss=1.0 - 0.3 * (1 - np.exp(-STEPS / 5))),
        ("error", 0),
    ),
}

STAYS_SILENT = {
    "plain": plain_network(),
    # one positive score for each of ten classes, as it should be
    "one hot": network(zeros=0.899),
    "many classes": network(zeros=0.98, units=100),
    # half of the scores are zero, as behind any ReLU, and something else is wrong
    "half": network(),
    # class maps behind a ReLU, pooled: it learns
    "learns": network(zeros=0.95, loss=plain_network()["loss"].values),
    # counts are never negative
    "counts": network(targets=(5.0, 2.0), operations=("MseLoss", "Relu", "Addmm")),
    # a ReLU before the last layer, as everywhere
    "hidden": network(zeros=1.0, operations=("NllLoss", "LogSoftmax", "Addmm")),
    # the zeros come from inside the network
    "dead inside": altered(network(zeros=1.0), dead_fraction=lambda v: np.where(np.arange(v.shape[1]) == 4, 1.0, v)),
}


@pytest.mark.parametrize("history, expected", FIRES.values(), ids=FIRES)
def test_fires(history, expected):
    """A ReLU that cuts off the answer is found where the loss is stuck, from the step since which it does."""
    check_rule(ReluOutput, fires=[history], seeds=())
    (finding,) = ReluOutput().check(history)

    assert expected == (finding.level, finding.first_step)
    assert ("act3",) == finding.layers


@pytest.mark.parametrize("history", STAYS_SILENT.values(), ids=STAYS_SILENT)
def test_stays_silent(history):
    """Nothing is found where the run learns, targets are not negative, or the ReLU is not the output's."""
    assert [] == list(ReluOutput().check(history))
