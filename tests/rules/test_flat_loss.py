"""flat-loss: when it is found, and when it is not."""

from dataclasses import replace

import numpy as np
import pytest

from isograd._history import Event
from isograd.rules.flat_loss import FlatLoss
from isograd.testing import altered, check_rule, plain_network

STEPS = np.arange(100)
STUCK = 1.0 + 0.0 * STEPS


def headed(*operations, silent=100, share=0.0, loss=STUCK):
    """A network whose loss has this head, without any gradient for its first steps."""
    history = altered(plain_network(), loss=loss, grad_max=lambda v: np.where((STEPS < silent)[:, None], 0.0, v))
    facts = {"operations": list(operations), "flat_share": share}
    return replace(history, events=(Event(step=0, kind="loss-graph", data=facts),))


FIRES = {
    # an error clamped to [-1, 1] before it is squared
    "clamped error": headed("Mean", "Pow", "Clamp", "Sub", "Addmm"),
    "sign": headed("Mean", "Sign", "Addmm"),
    "for a while": headed("Mean", "Pow", "Clamp", "Sub", "Addmm", silent=20),
    # a few errors within the clamp give a gradient that is no help
    "nearly all": headed("Mean", "Pow", "Clamp", "Squeeze", "Sub", "Addmm", silent=0, share=0.97),
}

STAYS_SILENT = {
    "plain": plain_network(),
    # a guard of a logarithm: nothing is cut
    "guard": headed("Neg", "Mean", "Log", "Clamp", "Softmax", "Addmm", silent=0),
    # a guard that cuts many, of a probability and not of an error
    "busy guard": headed("Neg", "Mean", "Log", "Clamp", "Softmax", "Addmm", silent=0, share=0.95),
    "zero at the first step": headed("Mean", "Pow", "Clamp", "Sub", "Addmm", silent=1),
    # no gradient, and no clamp either: another cause
    "no clamp": headed("MseLoss", "Addmm"),
    # clamped before the last layer
    "inside": headed("MseLoss", "Addmm", "Clamp"),
    "learns": headed("Mean", "Pow", "Clamp", "Sub", "Addmm", silent=0, share=0.97, loss=plain_network()["loss"].values),
}


@pytest.mark.parametrize("history", FIRES.values(), ids=FIRES)
def test_fires(history):
    """A loss that is flat where the predictions are is an error from the first step."""
    check_rule(FlatLoss, fires=[history], seeds=())
    (finding,) = FlatLoss().check(history)

    assert ("error", 0) == (finding.level, finding.first_step)


@pytest.mark.parametrize("history", STAYS_SILENT.values(), ids=STAYS_SILENT)
def test_stays_silent(history):
    """Nothing is found where gradients arrive, or nothing in the loss cuts them off."""
    assert [] == list(FlatLoss().check(history))
