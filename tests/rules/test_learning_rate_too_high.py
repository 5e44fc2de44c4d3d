"""learning-rate-too-high: when it is found, and when it is not."""

import numpy as np
import pytest

from isograd.rules.learning_rate_too_high import LearningRateTooHigh
from isograd.testing import altered, check_rule, check_severity, plain_network

STEPS = np.arange(100)
FALL = plain_network()["loss"].values


def steps_of(ratio, loss, *, since=0, until=100, **changes):
    """Update/weight ratios of this size between two steps, with this loss; NaN in it was not finite."""
    at = ((STEPS >= since) & (STEPS < until))[:, None]
    return altered(
        plain_network(),
        update_ratio=lambda v: np.where(at, ratio, v),
        loss=loss,
        loss_nonfinite=np.isnan(loss),
        **changes,
    )


RUNAWAY = np.where(STEPS < 6, 3.0 * 30.0 ** STEPS.astype(float), np.nan)
SILENCED = np.where((STEPS >= 8)[:, None], 0.0, 1.0)

FIRES = {
    # y = 5 x^2 with rate 0.1: 3, 90, 2700 … NaN within six steps
    "runaway": (steps_of(3.0, RUNAWAY), ("error", 0)),
    # ten times above its start, again and again
    "swinging": (steps_of(0.4, 2.3 + 30 * (STEPS % 10 == 5)), ("error", 0)),
    # it jumps at step 40 and comes back
    "one catapult": (steps_of(0.5, np.where(STEPS == 41, 20, FALL), since=40, until=42), ("warning", 40)),
    # the update at step 7 switched every unit off: the loss stands at ln 10
    "silenced": (steps_of(0.6, np.where(STEPS < 8, 2.4, 2.3026), since=7, until=8, grad_max=SILENCED), ("error", 7)),
}

STAYS_SILENT = {
    "plain": plain_network(),
    # small networks take large relative steps at first
    "large first steps": steps_of(0.3, FALL, until=5),
    # large steps throughout, and a loss that falls
    "large and well": steps_of(0.15, FALL),
    # targets that move: the loss spikes forty-fold under small updates
    "moving targets": altered(plain_network(), loss=np.where(STEPS % 20 == 19, 1.0, 0.025)),
    # restarts of a cyclic schedule stay below the start
    "restarts": steps_of(0.05, 2.3 * np.exp(-(STEPS % 50) / 10)),
    # the first loss is a thousand times the rest
    "first step": steps_of(0.2, np.where(STEPS == 0, 2464.0, 2.0)),
    # invalid forward pass: no rise before the NaN
    "sudden": steps_of(1e-3, np.where(STEPS < 50, FALL, np.nan)),
    # weights that start at zero: any first step is infinitely large against them
    "zero weights": steps_of(
        50.0, np.where(STEPS == 3, 12.0, FALL), until=2, weight_norm=lambda v: v * np.where(STEPS == 0, 0, 1)[:, None]
    ),
    # a new head on good features: the loss falls within three steps and swings below where it began
    "falls at once": steps_of(
        0.6, np.concatenate([[1.07, 1.96, 0.2, 0.45, 0.06], 0.1 + 0.09 * np.sin(np.arange(95.0))]), until=5
    ),
    # a policy's loss, weighed by standardized returns, swings about zero from a start that happens to be small
    "about zero": steps_of(0.2, np.where(STEPS < 5, -0.002, 0.0) + 0.02 * np.sin(STEPS / 8) * (STEPS >= 5)),
    # solved in three steps
    "solved at once": steps_of(0.6, np.where(STEPS == 0, 0.66, 1e-7)),
}


@pytest.mark.parametrize("history, expected", FIRES.values(), ids=FIRES)
def test_fires(history, expected):
    """Large steps with a loss that rises, or that stands with all units off, are found, from the first large step."""
    check_rule(LearningRateTooHigh, fires=[history], seeds=())
    (finding,) = LearningRateTooHigh().check(history)

    assert expected == (finding.level, finding.first_step)


@pytest.mark.parametrize("history", STAYS_SILENT.values(), ids=STAYS_SILENT)
def test_stays_silent(history):
    """Nothing is found where steps are large and do no harm, or harm comes with small steps."""
    assert [] == list(LearningRateTooHigh().check(history))


def test_worse_is_never_milder():
    """A loss that rises further never lowers the level."""
    check_severity(LearningRateTooHigh, [steps_of(0.5, 2.0 * rate**STEPS) for rate in (0.97, 1.0, 1.02, 1.05, 1.3)])
