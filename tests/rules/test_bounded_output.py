"""bounded-output: when it is found, and when it is not."""

from dataclasses import replace

import numpy as np
import pytest

from isograd._history import Event
from isograd.rules.bounded_output import BoundedOutput
from isograd.testing import altered, check_rule, plain_network

STUCK = 300 + np.sin(np.arange(100) * 1.7)
OUTPUT, TARGET = 8, 11  # columns: the last activation, which stands behind the last layer here, and the target


def network(mean, spread, *, span=None, operations=("MseLoss", "Sigmoid", "Addmm"), loss=STUCK, saturated=0.02):
    """A regression whose output goes through an activation; its targets lie within `span`, or 3 spreads of the mean."""
    low, high = span or (mean - 3 * spread, mean + 3 * spread)
    history = altered(
        plain_network(activation="sigmoid"),
        loss=loss,
        output_mean=lambda v: np.where(np.arange(v.shape[1]) == TARGET, mean, v),
        output_std=lambda v: np.where(np.arange(v.shape[1]) == TARGET, spread, v),
        output_min=lambda v: np.where(np.arange(v.shape[1]) == TARGET, low, v),
        output_max=lambda v: np.where(np.arange(v.shape[1]) == TARGET, high, v),
        saturation=lambda v: np.where(np.arange(v.shape[1]) == OUTPUT, saturated, v),
    )
    layers = list(history.layers)
    layers[9], layers[OUTPUT] = replace(layers[9], position=8), replace(layers[OUTPUT], position=9)
    event = Event(step=0, kind="loss-graph", data={"operations": list(operations)})
    return replace(history, layers=tuple(layers), events=(event,))


def unread(history):
    """The target is not among what was read: the loss is written out."""
    layers = [replace(layer, role="module") if layer.role == "target" else layer for layer in history.layers]
    return replace(history, layers=tuple(layers))


FIRES = {
    # 3 x + 1 for x up to 10, behind a sigmoid
    "far above": (network(16.0, 9.0), "error"),
    # skewed, and a good part of it is beyond the range all the same
    "skewed": (network(2.0, 3.0, span=(0.0, 40.0)), "error"),
    # standardized data behind a sigmoid: half of it is negative. The rest is learned
    "standardized": (network(0.0, 1.0, loss=plain_network()["loss"].values), "warning"),
    "tanh": (network(0.0, 4.0, operations=("MseLoss", "Tanh", "Addmm")), "error"),
    # what is left of the entries, and in which order, does not widen the range
    "selected": (network(16.0, 9.0, operations=("MseLoss", "Index", "Squeeze", "Sigmoid", "Clamp", "Addmm")), "error"),
    # a loss written out, and the activation right below its difference
    "written out": (network(16.0, 9.0, operations=("Mean", "Mul", "Pow", "Sub", "Sigmoid", "Addmm")), "error"),
    # a loss written out, an output that sits at its end
    "pinned": (
        unread(network(0.5, 0.2, operations=("Mean", "Pow", "Sub", "Sigmoid", "Addmm"), saturated=1.0)),
        "error",
    ),
}

STAYS_SILENT = {
    "plain": plain_network(),
    # drawings in [0, 1], most of whose pixels are 0
    "skewed images": network(0.3, 0.37, span=(0.0, 1.0)),
    "skewed the other way": network(0.72, 0.36, span=(0.0, 1.0)),
    # images in [0, 1]
    "images": network(0.3, 0.3),
    # a few outliers beyond the end
    "outliers": network(0.5, 0.45),
    "tanh on actions": network(0.0, 0.6, operations=("MseLoss", "Tanh", "Addmm")),
    # probabilities are what a cross-entropy wants
    "cross-entropy": network(16.0, 9.0, operations=("BinaryCrossEntropy", "Sigmoid", "Addmm")),
    "linear": network(16.0, 9.0, operations=("MseLoss", "Addmm")),
    # the answer is scaled behind the sigmoid: it reaches further
    "scaled": network(16.0, 9.0, operations=("MseLoss", "Mul", "Addmm")),
    "scaled sigmoid": network(16.0, 9.0, operations=("MseLoss", "Mul", "Sigmoid", "Addmm")),
    "scaled and shifted": network(16.0, 9.0, operations=("Mean", "Pow", "Sub", "Add", "Mul", "Tanh", "Addmm")),
    # a sigmoid moved to -0.5 ... 0.5 below a loss that is no part of what was written out
    "shifted": network(-0.4, 0.05, operations=("MseLoss", "Sub", "Sigmoid", "Addmm")),
    # a mixture of experts: the softmax weighs their answers, which reach anywhere
    "gate": network(
        0.0, 1.3, operations=("Add", "MseLoss", "Sum", "Mul", "Scatter", "Div", "Topk", "Softmax", "Addmm")
    ),
    # saturated, with targets that are reached there
    "binary targets": network(0.5, 0.5, saturated=1.0),
    # not read, and it learns
    "learns": unread(
        network(
            0.5,
            0.2,
            operations=("Mean", "Pow", "Sub", "Sigmoid", "Addmm"),
            saturated=1.0,
            loss=plain_network()["loss"].values,
        )
    ),
}


@pytest.mark.parametrize("history, level", FIRES.values(), ids=FIRES)
def test_fires(history, level):
    """An output that cannot reach a good part of the targets is found from the first step."""
    check_rule(BoundedOutput, fires=[history], seeds=())
    (finding,) = BoundedOutput().check(history)

    assert (level, 0) == (finding.level, finding.first_step)


@pytest.mark.parametrize("history", STAYS_SILENT.values(), ids=STAYS_SILENT)
def test_stays_silent(history):
    """Nothing is found where targets fit, or the loss is meant for probabilities."""
    assert [] == list(BoundedOutput().check(history))
