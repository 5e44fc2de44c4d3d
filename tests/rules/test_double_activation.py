"""double-activation: when it is found, and when it is not."""

from dataclasses import replace

import numpy as np
import pytest

from isograd._history import Event
from isograd.rules.double_activation import DoubleActivation
from isograd.testing import altered, check_rule, plain_network

STUCK = 1.3 + 0.01 * np.sin(np.arange(100) * 1.7)


def headed(*operations, loss=None):
    """A network whose loss has this head, from the loss down."""
    network = plain_network() if loss is None else altered(plain_network(), loss=loss)
    return replace(network, events=(Event(step=0, kind="loss-graph", data={"operations": list(operations)}),))


FIRES = {
    # the accuracy may be perfect, the loss cannot come down
    "softmax twice": (headed("NllLoss", "LogSoftmax", "Softmax", "Addmm"), "warning"),
    "stuck": (headed("NllLoss", "LogSoftmax", "Softmax", "Addmm", loss=STUCK), "error"),
    "sigmoid twice": (headed("BinaryCrossEntropyWithLogits", "Sigmoid", "Addmm"), "warning"),
    # one sigmoid per class before a cross-entropy
    "sigmoid and softmax": (headed("NllLoss", "LogSoftmax", "Sigmoid", "Addmm"), "warning"),
    # an axis is dropped in between
    "squeezed": (headed("BinaryCrossEntropyWithLogits", "Squeeze", "Sigmoid", "Addmm"), "warning"),
}

STAYS_SILENT = {
    "plain": plain_network(),
    "scores": headed("NllLoss", "LogSoftmax", "Addmm"),
    "sigmoid once": headed("BinaryCrossEntropy", "Sigmoid", "Addmm"),
    # the log-softmax of a log-softmax is the same log-softmax
    "log-softmax twice": headed("NllLoss", "LogSoftmax", "LogSoftmax", "Addmm"),
    # scaled in between: scores of any size again
    "temperature": headed("NllLoss", "LogSoftmax", "Div", "Sigmoid", "Addmm"),
    # attention weights are multiplied with values before anything else
    "attention": headed("NllLoss", "LogSoftmax", "Bmm", "Softmax", "Addmm"),
    # a distillation target is another branch, and the mean of a log is no activation
    "gate": headed("MseLoss", "Mul", "Sigmoid", "Addmm"),
}


@pytest.mark.parametrize("history, level", FIRES.values(), ids=FIRES)
def test_fires(history, level):
    """Two activations in series are found from the first step, worse where the loss is stuck."""
    check_rule(DoubleActivation, fires=[history], seeds=())
    (finding,) = DoubleActivation().check(history)

    assert (level, 0) == (finding.level, finding.first_step)


@pytest.mark.parametrize("history", STAYS_SILENT.values(), ids=STAYS_SILENT)
def test_stays_silent(history):
    """Nothing is found where the loss gets scores, or something stands between the activations."""
    assert [] == list(DoubleActivation().check(history))
