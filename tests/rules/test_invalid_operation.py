"""invalid-operation: when it is found, and when it is not."""

from dataclasses import replace

import numpy as np
import pytest

from isograd._history import Event
from isograd.rules.invalid_operation import InvalidOperation
from isograd.testing import altered, check_rule, continued, plain_network

STEPS = np.arange(100)


def broken(*, since=50, until=100, layers=(), loss=True, gradients=True, weights_since=1000, **changes):
    """A forward pass that is not finite between two steps, from these layers on."""
    at = (STEPS >= since) & (STEPS < until)
    first = min(layers, default=99)
    return altered(
        plain_network(),
        output_nonfinite=lambda v: v + at[:, None] * np.isin(np.arange(v.shape[1]), layers),
        input_nonfinite=lambda v: v + at[:, None] * np.isin(np.arange(v.shape[1]), [i for i in layers if i > first]),
        loss_nonfinite=at & loss,
        grad_nonfinite=lambda v: v + at[:, None] * gradients,
        weight_nonfinite=lambda v: v + (STEPS >= weights_since)[:, None],
        **changes,
    )


TOLD = Event(
    step=50,
    kind="nonfinite",
    data={
        "place": "operation",
        "operation": "Log",
        "reason": "log of 0",
        "count": 5,
        "rows": 3,
        "num_rows": 64,
        "file": "train.py",
        "line": 42,
        "code": "loss = torch.log(p)",
    },
)
LARGE = altered(plain_network(), loss=np.full(100, 7e28), grad_norm=np.inf)
STEEP = altered(
    plain_network(),
    loss=1e17,
    grad_max=lambda v: np.where((STEPS == 0)[:, None] & (np.arange(10) == 2), 3e19, v),
    grad_norm=lambda v: np.where((STEPS == 0)[:, None] & (np.arange(10) == 2), np.inf, v),
)

FIRES = {
    # log(softmax(x)) underflows at step 50 and poisons everything
    "loss": (broken(weights_since=51), ("error", 50, None)),
    # a user's own layer divides by zero
    "layer": (broken(layers=[4, 5, 6, 7, 8, 9, 10], weights_since=51), ("error", 50, "act1")),
    # a mean over nothing: gradients and weights stay finite
    "harmless": (broken(until=51, gradients=False), ("warning", 50, None)),
    # masked on purpose from the start, and something else breaks later
    "masked, then broken": (
        altered(
            broken(layers=[6, 7, 8, 9, 10], weights_since=51),
            output_nonfinite=lambda v: v + (np.arange(v.shape[1]) == 9),
        ),
        ("error", 50, "act2"),
    ),
    # an all-masked softmax, traced to its operation
    "traced": (replace(broken(weights_since=51), events=(TOLD,)), ("error", 50, None)),
    # exp of an unbounded output: finite, and far beyond what float32 can square
    "overflow": (LARGE, ("error", 0, None)),
    # the loss can be squared, its gradient cannot
    "steep": (STEEP, ("error", 0, "linear1.weight")),
}

STAYS_SILENT = {
    "plain": plain_network(),
    # a similarity of -inf for every row with itself, at every step: the loss and all gradients are finite
    "masked": broken(since=0, layers=[9], loss=False, gradients=False),
    # the weights were NaN before the forward pass
    "weights": broken(weights_since=50),
    # the data was
    "input": broken(layers=[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
    # the backward pass broke one step earlier
    "gradient first": altered(broken(since=51), grad_nonfinite=lambda v: v + (STEPS >= 50)[:, None]),
    # a loss on its way to infinity
    "runaway": broken(loss=True, weights_since=51) and altered(broken(weights_since=51), loss=2.0**STEPS),
    # gradients on their way
    "exploding": altered(broken(weights_since=51), global_grad_norm=np.where(STEPS == 49, 1e5, 1.0)),
    # weights that an update has thrown away
    "thrown": altered(broken(weights_since=51), weight_norm=lambda v: v * np.where(STEPS >= 50, 30.0, 1.0)[:, None]),
    # a norm that overflows later, on its way
    "later overflow": altered(
        plain_network(),
        grad_max=lambda v: np.where((STEPS == 5)[:, None], 3e19, v),
        grad_norm=lambda v: np.where((STEPS == 5)[:, None], np.inf, v),
    ),
    # a gradient scaler skipped the step
    "scaled": broken(until=51, skipped=STEPS == 50),
}


@pytest.mark.parametrize("history, expected", FIRES.values(), ids=FIRES)
def test_fires(history, expected):
    """A forward pass that breaks by itself is found, at its level, in its layer and from its step."""
    check_rule(InvalidOperation, fires=[history], seeds=(), factors=(0.5, 2.0))
    (finding,) = InvalidOperation().check(history)

    assert expected == (finding.level, finding.first_step, next(iter(finding.layers), None))


@pytest.mark.parametrize("history", STAYS_SILENT.values(), ids=STAYS_SILENT)
def test_stays_silent(history):
    """Nothing is found where weights, data or gradients broke first, or values had run away before."""
    assert [] == list(InvalidOperation().check(history))


def test_the_traced_operation_is_named():
    """What the observer traced stands in the message: the operation, its source line and the rows."""
    (finding,) = InvalidOperation().check(FIRES["traced"][0])

    assert "log of 0 at train.py:42 (`loss = torch.log(p)`), 3 of 64 rows." in finding.message


def test_a_past_finding_stays():
    """Healthy steps after the fault do not remove it."""
    (finding,) = InvalidOperation().check(continued(broken(weights_since=51)))

    assert 50 == finding.first_step
