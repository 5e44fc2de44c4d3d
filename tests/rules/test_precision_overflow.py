"""precision-overflow: when it is found, and when it is not."""

from dataclasses import replace

import numpy as np
import pytest

from isograd.rules.precision_overflow import PrecisionOverflow
from isograd.testing import altered, check_rule, check_severity, plain_network

STEPS = np.arange(200)
NETWORK = plain_network(steps=200)


def overflowing(*, since=50, dtype="float16", layer="linear2", weights_first=False, inputs_first=False, lasting=True):
    """A network of this type one of whose layers puts out Inf from a step on, which its weights do not survive."""
    hit = (STEPS >= since) if lasting else (STEPS == since)
    at = [entry.name for entry in NETWORK.layers].index(layer)
    here = (np.arange(len(NETWORK.layers)) == at) & hit[:, None]
    behind = (np.arange(len(NETWORK.layers)) > at) & hit[:, None]
    broken = STEPS >= (since if weights_first else since + 1)
    history = altered(
        NETWORK,
        output_nonfinite=lambda v: np.where(here | behind, 12.0, v),
        input_nonfinite=lambda v: np.where(behind | (here & inputs_first), 12.0, v),
        loss=lambda v: np.where(hit, np.nan, v),
        loss_nonfinite=hit,
        grad_nonfinite=lambda v: v + (hit & lasting)[:, None],
        weight_nonfinite=lambda v: v + (broken & lasting)[:, None],
    )
    return replace(history, layers=tuple(replace(entry, dtype=dtype) for entry in history.layers))


def scaled(skipped, *, scale=1024.0, loss=None):
    """A network under a gradient scaler that leaves out these steps."""
    changes = {} if loss is None else {"loss": loss}
    return altered(NETWORK, skipped=skipped, loss_scale=scale, **changes)


def squared(size, *, dtype="float16"):
    """A network of this type whose head puts out values of this size; their squares make the loss of step 50 Inf."""
    history = overflowing(dtype=dtype)
    return altered(
        history,
        output_nonfinite=lambda v: 0 * v,
        input_nonfinite=lambda v: 0 * v,
        output_max=lambda v: np.where([entry.name == "head" for entry in history.layers], size, v),
    )


FIRES = {
    "forward": (overflowing(), ("error", 50)),
    "first step": (overflowing(since=0), ("error", 0)),
    # one batch, and a scaler left the step out
    "one batch": (overflowing(lasting=False), ("warning", 50)),
    "float8": (overflowing(dtype="float8_e4m3fn"), ("error", 50)),
    "square in the loss": (squared(300.0), ("error", 50)),
    # the scaler halves its scale to nothing
    "every step": (scaled(1.0, scale=65536.0 * 2.0**-STEPS), ("error", 0)),
    "two of three": (scaled(STEPS % 3 > 0), ("warning", 1)),
    # rarely, but at no scale
    "scale below 1": (scaled(STEPS % 5 == 0, scale=0.25), ("warning", 0)),
}

STAYS_SILENT = {
    "plain": NETWORK,
    # a scaler on its way down
    "first steps": scaled(STEPS < 14, scale=np.maximum(4.0, 65536.0 * 2.0**-STEPS)),
    # and once in a while on its way up
    "now and then": scaled(STEPS % 50 == 49),
    # the same in types with the range of float32
    "bfloat16": overflowing(dtype="bfloat16"),
    "float32": overflowing(dtype="float32"),
    # an activation, a softmax: no product, other operations make NaN by themselves
    "activation": overflowing(layer="act2"),
    # log 0 makes the same loss of numbers that fit
    "other operation": squared(20.0),
    "square in float32": squared(300.0, dtype="float32"),
    # it came in
    "inputs": overflowing(inputs_first=True),
    "weights": overflowing(weights_first=True),
}


@pytest.mark.parametrize("history, expected", FIRES.values(), ids=FIRES)
def test_fires(history, expected):
    """Products that leave the range of a narrow type are found at that step, and scalers that find no scale."""
    check_rule(PrecisionOverflow, fires=[history], seeds=())
    (finding,) = PrecisionOverflow().check(history)

    assert expected == (finding.level, finding.first_step)


def test_names_the_layer():
    """The layer whose own product overflowed is named, not those that received Inf."""
    (finding,) = PrecisionOverflow().check(overflowing())

    assert ("linear2",) == finding.layers


@pytest.mark.parametrize("history", STAYS_SILENT.values(), ids=STAYS_SILENT)
def test_stays_silent(history):
    """Nothing is found where a scaler does its work, the range is wide, or values were not finite before."""
    assert [] == list(PrecisionOverflow().check(history))


def test_more_is_never_milder():
    """More steps left out never lower the level."""
    check_severity(PrecisionOverflow, [scaled(STEPS % 10 < k) for k in (0, 1, 5, 8, 10)])
