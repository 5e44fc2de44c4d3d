"""epsilon-too-small: when it is found, and when it is not."""

from dataclasses import replace

import numpy as np
import pytest

from isograd.rules.epsilon_too_small import EpsilonTooSmall
from isograd.testing import altered, check_rule, check_severity, plain_network

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


# ---- gradients below epsilon ----------------------------------------------------------------------------------------

STUCK = 2.3 + 0.01 * np.sin(STEPS * 1.7)


def below(ratio, *, epsilon=1e-8, loss=STUCK, optimizer="Adam", steps=STEPS >= 0):
    """A network under Adam whose gradients have a root mean square of this many epsilons, in some of the steps."""
    history = plain_network()
    norms = np.sqrt([p.size for p in history.parameters]) * epsilon * ratio
    history = altered(history, grad_norm=lambda v: np.where(steps[:, None], norms, v), loss=loss)
    betas = {"betas": [0.9, 0.999]} if optimizer == "Adam" else {}
    return replace(history, groups=({"optimizer": optimizer, "lr": 1e-3, "eps": epsilon, **betas},))


BELOW = {
    "far below": (below(0.01), ("error", 0)),
    "as large": (below(0.99), ("error", 0)),
    # a large epsilon is as bad as a small gradient
    "large epsilon": (below(0.05, epsilon=0.1), ("error", 0)),
    "later": (below(0.01, steps=STEPS >= 45), ("error", 45)),
    "partly learned": (below(0.01, loss=np.where(STEPS < 20, 2.3 - 0.03 * STEPS, 1.7)), ("warning", 0)),
}

ABOVE = {
    "above": below(30.0),
    # chosen on purpose, and it learns
    "learns": below(0.05, epsilon=0.1, loss=plain_network()["loss"].values),
    # gradients vanish with the loss
    "converged": below(0.01, loss=2.3 * np.exp(-STEPS / 5), steps=STEPS >= 40),
    # nothing arrives at all
    "zero": below(0.0),
    "SGD": below(0.01, optimizer="SGD"),
    "for a while": below(0.01, steps=STEPS < 30),
}


@pytest.mark.parametrize("history, expected", BELOW.values(), ids=BELOW)
def test_finds_gradients_below(history, expected):
    """Gradients that stay below epsilon under a stuck loss are found since they do."""
    # Rescaling the loss lifts gradients over epsilon or takes them below it: that is the fault itself.
    check_rule(EpsilonTooSmall, fires=[history], seeds=(), factors=())
    (finding,) = EpsilonTooSmall().check(history)

    assert expected == (finding.level, finding.first_step)


@pytest.mark.parametrize("history", ABOVE.values(), ids=ABOVE)
def test_leaves_gradients_above(history):
    """Nothing is found where gradients exceed epsilon, the run learns, or no epsilon divides them."""
    assert [] == list(EpsilonTooSmall().check(history))


def test_smaller_is_never_milder():
    """Smaller gradients never lower the level."""
    check_severity(EpsilonTooSmall, [below(ratio) for ratio in (100, 10, 1, 0.1, 1e-4)])
