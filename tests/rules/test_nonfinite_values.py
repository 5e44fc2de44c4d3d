"""nonfinite-values: where the first one stood, and when it is no alarm."""

from dataclasses import replace

import numpy as np
import pytest

from isograd._history import Event
from isograd.rules.nonfinite_values import NonfiniteValues
from isograd.testing import altered, check_rule, continued, plain_network

STEPS = np.arange(100)


def bad(*, since=50, until=100, **columns):
    """Statistic -> columns (or True for a per-step one) that count something from `since` until before `until`."""

    def counts(where):
        at = (STEPS >= since) & (STEPS < until)
        return lambda v: v + (at if where is True else at[:, None] * np.isin(np.arange(v.shape[1]), where))

    changes = {name: counts(where) for name, where in columns.items()}
    return altered(plain_network(), **changes)


PARAMETERS = list(range(10))

FIRES = {
    # a batch with NaN: everything after it is NaN as well
    "input": (
        bad(
            output_nonfinite=list(range(12)),
            input_nonfinite=list(range(1, 12)),
            loss_nonfinite=True,
            grad_nonfinite=PARAMETERS,
        ),
        ("error", "input", 50),
    ),
    # the first layer with bad outputs from good inputs is to blame, not the ones behind it
    "output": (
        bad(
            output_nonfinite=[6, 7, 8, 9, 10],
            input_nonfinite=[7, 8, 9, 10],
            loss_nonfinite=True,
            grad_nonfinite=PARAMETERS,
        ),
        ("error", "act2", 50),
    ),
    # the loss itself
    "loss": (bad(loss_nonfinite=True, grad_nonfinite=PARAMETERS), ("error", None, 50)),
    # the forward pass is finite; the signal breaks in the layer nearest the loss
    "gradient": (bad(signal_nonfinite=[1, 3, 5], grad_nonfinite=[0, 1, 2, 3, 4, 5]), ("error", "linear2", 50)),
    # an update wrote NaN although the gradient was finite
    "weight": (bad(weight_nonfinite=[2, 3]), ("error", "linear1.weight", 50)),
    "state": (bad(state_nonfinite=[4]), ("warning", "linear2.weight", 50)),
    # a mean over nothing: no gradient and no weight was touched
    "harmless loss": (bad(loss_nonfinite=True, until=51), ("warning", None, 50)),
    # one bad gradient that the program itself left out
    "one step": (bad(grad_nonfinite=[0], until=51), ("warning", "linear0.weight", 50)),
    # only the observer's own report, between deep readings
    "told": (
        replace(
            bad(since=7, until=8, loss_nonfinite=True),
            events=(Event(step=7, kind="nonfinite", layer="act1", data={"place": "output"}),),
        ),
        ("warning", "act1", 7),
    ),
    # a scaler that skips nearly every step has found no scale
    "restless scaler": (bad(since=5, skipped=True, grad_nonfinite=PARAMETERS), ("warning", None, 20)),
}

STAYS_SILENT = {
    "plain": plain_network(),
    # a similarity matrix whose diagonal is -inf on purpose: the loss and its gradients are finite
    "masked": bad(since=0, output_nonfinite=[9]),
    # missing values come in as NaN, and the first layer replaces them
    "missing values": bad(since=0, output_nonfinite=[0], input_nonfinite=[1]),
    # the first steps of a gradient scaler, which starts at 2^16 and halves
    "scaler settles": bad(since=0, until=6, skipped=True, grad_nonfinite=PARAMETERS),
    # and one overflow in a while
    "scaler probes": bad(since=60, until=61, skipped=True, grad_nonfinite=PARAMETERS),
}


@pytest.mark.parametrize("history, expected", FIRES.values(), ids=FIRES)
def test_fires(history, expected):
    """The first place in time and in the order of computation is named, at its level."""
    check_rule(NonfiniteValues, fires=[history], seeds=())
    (finding,) = NonfiniteValues().check(history)

    assert expected == (finding.level, next(iter(finding.layers), None), finding.first_step)


@pytest.mark.parametrize("history", STAYS_SILENT.values(), ids=STAYS_SILENT)
def test_stays_silent(history):
    """Nothing is found where all is finite, or where a gradient scaler looks for its scale."""
    assert [] == list(NonfiniteValues().check(history))


@pytest.mark.parametrize("history", [row[0] for row in FIRES.values()], ids=FIRES)
def test_a_past_finding_stays(history):
    """Healthy steps after a fault do not remove what was found, nor the step at which it began."""
    (before,) = NonfiniteValues().check(history)
    after = [finding.first_step for finding in NonfiniteValues(skip_share=0.2).check(continued(history))]

    assert [before.first_step] == after


def test_the_earlier_place_wins():
    """Of a gradient at step 20 and a loss at step 21, the gradient is named."""
    gradient = bad(since=20, grad_nonfinite=[8])
    both = altered(gradient, loss_nonfinite=lambda v: v + (STEPS >= 21))

    (finding,) = NonfiniteValues().check(both)

    assert ("head.weight", 20) == (finding.layers[0], finding.first_step)


@pytest.mark.parametrize(
    "told, expected",
    [
        (
            {"reason": "log of 0", "file": "a.py", "line": 3, "code": "y = x.log()"},
            "log of 0 at a.py:3 (`y = x.log()`)",
        ),
        ({"reason": "log of 0", "file": "a.py", "line": 3, "code": ""}, "from log of 0 at a.py:3, 2 entries"),
        ({"reason": "log of 0"}, "from log of 0, 2 entries"),
        ({"reason": "overflow", "operation": "Mm"}, "from overflow in Mm, 2 entries"),
        ({"operation": "Mm"}, "from Mm, 2 entries"),
        ({"file": 7, "line": None, "rows": "x", "num_rows": 0}, "from an operation, 2 entries"),
    ],
)
def test_what_was_traced_is_named(told, expected):
    """The message says of the operation what is known of it: reason, source line and how much was hit."""
    event = Event(step=7, kind="nonfinite", layer="act1", data={"place": "operation", "count": 2, **told})
    (finding,) = NonfiniteValues().check(replace(bad(since=7, until=8, loss_nonfinite=True), events=(event,)))

    assert expected in finding.message
