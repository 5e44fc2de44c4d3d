"""nonfinite-inputs: when it is found, and when it is not."""

from dataclasses import replace

import numpy as np
import pytest

from isograd._history import Event
from isograd.rules.nonfinite_inputs import NonfiniteInputs
from isograd.testing import altered, check_rule, continued, plain_network

STEPS = np.arange(100)


def fed(*, at=(), broken=50, gradients=True):
    """Inputs with NaN at some steps; loss and gradients not finite from step `broken` on."""
    hit = np.isin(STEPS, at)[:, None] * 3.0
    return altered(
        plain_network(),
        output_nonfinite=lambda v: v + hit * (np.arange(v.shape[1]) == 0),
        loss_nonfinite=STEPS == broken if not gradients else STEPS >= broken,
        grad_nonfinite=lambda v: v + (STEPS >= broken)[:, None] * gradients,
    )


TOLD = Event(step=50, kind="nonfinite", data={"place": "input", "count": 784})

FIRES = {
    # one poisoned batch
    "poisoned": (fed(at=[50]), ("error", 50)),
    # the program left that step out
    "survived": (fed(at=[50], gradients=False), ("warning", 50)),
    # found by the observer between deep readings
    "told": (replace(fed(), events=(TOLD,)), ("error", 50)),
}

STAYS_SILENT = {
    "plain": plain_network(),
    # a mask of -inf at every step, and a NaN of other origin
    "mask": fed(at=range(100)),
    # a model that replaces NaN
    "coped": fed(at=[20], broken=1000),
    # inputs were fine
    "elsewhere": fed(),
}


@pytest.mark.parametrize("history, expected", FIRES.values(), ids=FIRES)
def test_fires(history, expected):
    """An input that was not finite when the run first broke is found, at its level."""
    check_rule(NonfiniteInputs, fires=[history], seeds=())
    (finding,) = NonfiniteInputs().check(history)

    assert expected == (finding.level, finding.first_step)


@pytest.mark.parametrize("history", STAYS_SILENT.values(), ids=STAYS_SILENT)
def test_stays_silent(history):
    """Nothing is found where inputs are finite, or such values are meant."""
    assert [] == list(NonfiniteInputs().check(history))


def test_a_past_finding_stays():
    """Healthy steps after the fault do not remove it."""
    (finding,) = NonfiniteInputs().check(continued(fed(at=[50])))

    assert 50 == finding.first_step


def test_the_row_of_the_batch_is_named():
    """Which row of the batch was bad, of how many, and the line that used it stand in the message."""
    where = {"file": "train.py", "line": 42, "code": "out = model(x)"}
    rows = {"rows": 1, "num_rows": 32, "row_index": 14}
    told = Event(step=50, kind="nonfinite", data={"place": "input", "name": "input", "count": 3, **rows, **where})
    (finding,) = NonfiniteInputs().check(replace(fed(), events=(told,)))

    expected = "3 entries, first in row 14 of the batch (1 of 32 rows), used at train.py:42 (`out = model(x)`)."
    assert finding.message.endswith(expected)
    assert "The input of the model was not finite at step 50" in finding.message


def test_a_bad_target_is_called_one():
    """Non-finite targets are not called inputs."""
    told = Event(step=50, kind="nonfinite", data={"place": "input", "name": "target", "count": 1})
    (finding,) = NonfiniteInputs().check(replace(fed(), events=(told,)))

    assert "The target was not finite at step 50" in finding.message
