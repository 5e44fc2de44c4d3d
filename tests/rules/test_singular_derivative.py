"""singular-derivative: when it is found, and when it is not."""

from dataclasses import replace

import numpy as np
import pytest

from isograd._history import Event
from isograd.rules.singular_derivative import SingularDerivative
from isograd.testing import altered, check_rule, plain_network

STEPS = np.arange(100)


def broken(at=40, *, back=100, loss_from=41, history=None, **changes):
    """Gradients that are not finite from a step on until they are again; the loss follows at another step."""
    during = (STEPS >= at) & (STEPS < back)
    lost = (STEPS >= loss_from) & (STEPS < back)
    return altered(
        history or plain_network(),
        grad_nonfinite=lambda v: v + 3.0 * during[:, None],
        grad_norm=lambda v: np.where(during[:, None], np.nan, v),
        grad_max=lambda v: np.where(during[:, None], np.nan, v),
        global_grad_norm=lambda v: np.where(during, np.nan, v),
        loss=lambda v: np.where(lost, np.nan, v),
        loss_nonfinite=lost.astype(float),
        weight_nonfinite=lambda v: v + 3.0 * lost[:, None],
        **changes,
    )


FIRES = {
    # the loss shows it one step later
    "poisoned": (broken(), ("error", 40)),
    "first step": (broken(0, loss_from=1), ("error", 0)),
    # the program left the step out: weights stayed finite
    "left out": (broken(40, back=41, loss_from=200), ("warning", 40)),
}

STAYS_SILENT = {
    "plain": plain_network(),
    # the forward pass broke at the same step
    "loss first": broken(loss_from=40),
    # a gradient that grew through every decade before
    "ran away": altered(
        broken(), global_grad_norm=np.where(STEPS < 40, np.where(STEPS < 35, 1.0, 10.0 ** (STEPS - 34.0)), np.nan)
    ),
    # a loss scale that was too large
    "skipped": broken(40, back=41, loss_from=200, skipped=(STEPS == 40).astype(float)),
    # half precision: an ordinary gradient overflows
    "float16": replace(broken(), parameters=tuple(replace(p, dtype="float16") for p in plain_network().parameters)),
    # the weights were lost before
    "weights first": altered(broken(), weight_nonfinite=lambda v: v * 0 + (STEPS >= 39)[:, None]),
}


@pytest.mark.parametrize("history, expected", FIRES.values(), ids=FIRES)
def test_fires(history, expected):
    """A gradient that breaks under a finite loss is found at its step; an error where the weights are lost."""
    check_rule(SingularDerivative, fires=[history], seeds=())
    (finding,) = SingularDerivative().check(history)

    assert expected == (finding.level, finding.first_step)


@pytest.mark.parametrize("history", STAYS_SILENT.values(), ids=STAYS_SILENT)
def test_stays_silent(history):
    """Nothing is found where something else broke first, or gradients had run away."""
    assert [] == list(SingularDerivative().check(history))


def test_the_traced_operation_is_named():
    """The operation without a finite derivative stands in the message with its source line and rows."""
    data = {
        "place": "gradient",
        "operation": "Sqrt",
        "reason": "no finite derivative of sqrt(0)",
        "count": 1,
        "rows": 1,
        "num_rows": 32,
        "file": "models/pair.py",
        "line": 7,
        "code": "distance = squares.sum(1).sqrt()",
    }
    (finding,) = SingularDerivative().check(replace(broken(), events=(Event(step=40, kind="nonfinite", data=data),)))

    where = "models/pair.py:7 (`distance = squares.sum(1).sqrt()`), 1 of 32 rows."
    assert f"no finite derivative of sqrt(0) at {where}" in finding.message
