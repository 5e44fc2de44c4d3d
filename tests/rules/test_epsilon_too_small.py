"""epsilon-too-small: when it is found, and when it is not."""

from dataclasses import replace

import numpy as np
import pytest

from isograd.rules.epsilon_too_small import EpsilonTooSmall
from isograd.testing import altered, check_rule, plain_network

STEPS = np.arange(100)


def half(epsilon, *, since=1, dtype="float16", gradient_first=False):
    """A network in this type whose weights are lost from a step on."""
    lost = STEPS >= since
    history = altered(
        plain_network(),
        weight_nonfinite=lambda v: v + 5.0 * lost[:, None],
        grad_nonfinite=lambda v: v + 5.0 * (STEPS >= since - gradient_first)[:, None],
        loss=lambda v: np.where(lost, np.nan, v),
        loss_nonfinite=lost.astype(float),
    )
    parameters = tuple(replace(p, dtype=dtype) for p in history.parameters)
    return replace(history, parameters=parameters, groups=({"optimizer": "Adam", "lr": 1e-3, "eps": epsilon},))


FIRES = {
    "default": (half(1e-8), 0),
    "later": (half(1e-8, since=40), 39),
    # half of the smallest number rounds to even: zero
    "just rounded away": (half(2.0**-25), 0),
}

STAYS_SILENT = {
    "plain": plain_network(),
    # representable
    "stable": half(1e-4),
    "smallest number": half(2.0**-24),
    # the type holds it: the weights were lost for another reason
    "bfloat16": half(1e-8, dtype="bfloat16"),
    "float32": half(1e-8, dtype="float32"),
    "no epsilon": half(0.0),
    # nothing broke: the optimizer keeps its state elsewhere
    "finite": half(1e-8, since=200),
    # a gradient overflowed before
    "gradient first": half(1e-8, since=40, gradient_first=True),
}


@pytest.mark.parametrize("history, step", FIRES.values(), ids=FIRES)
def test_fires(history, step):
    """Weights lost under an epsilon that is zero in their type are an error at the step that lost them."""
    check_rule(EpsilonTooSmall, fires=[history], seeds=())
    (finding,) = EpsilonTooSmall().check(history)

    assert ("error", step) == (finding.level, finding.first_step)


@pytest.mark.parametrize("history", STAYS_SILENT.values(), ids=STAYS_SILENT)
def test_stays_silent(history):
    """Nothing is found where the type holds the epsilon, or nothing was lost by an update."""
    assert [] == list(EpsilonTooSmall().check(history))
