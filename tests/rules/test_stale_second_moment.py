"""stale-second-moment: when it is found, and when it is not."""

from dataclasses import replace

import numpy as np
import pytest

from isograd.rules.stale_second_moment import StaleSecondMoment
from isograd.testing import altered, check_rule, check_severity, plain_network

STEPS = np.arange(1000)
RATE = 1e-3
NETWORK = plain_network(steps=1000)
FALLING = NETWORK["loss"].values
RELAPSED = np.where((STEPS > 600) & (STEPS < 700), 2.5, FALLING)
SIZES = np.array([p.size for p in NETWORK.parameters])


def jumped(factor, *, at=600, until=1000, loss=RELAPSED, betas=(0.9, 0.999), optimizer="AdamW", **changes):
    """A network under Adam whose gradient is this much larger from one step to another."""
    level = np.where((at <= STEPS) & (until > STEPS), factor, 1.0) * 1e-3
    changes = {"update_norm": np.nan, **changes}
    history = altered(NETWORK, learning_rate=RATE, grad_norm=level[:, None], loss=loss, **changes)
    return replace(history, groups=({"optimizer": optimizer, "lr": RATE, "betas": [*betas], "eps": 1e-15},))


def moved(rms):
    """The same with updates, measured at every step, of this root mean square in learning rates."""
    return jumped(100, update_norm=rms * RATE * np.sqrt(SIZES) * np.ones((1000, 1)))


FIRES = {
    # the loss loses what had been learned
    "jump": (jumped(100), "warning"),
    "small jump": (jumped(6), "warning"),
    # it never comes back
    "lost": (
        altered(jumped(100, loss=np.where(STEPS > 603, np.nan, FALLING)), loss_nonfinite=STEPS > 603),
        "error",
    ),
    # the model takes it
    "harmless": (jumped(100, loss=FALLING), "info"),
    # other data: the loss was as high at the jump itself, before any update
    "new data": (jumped(100, loss=np.where(STEPS == 600, 2.6, RELAPSED)), "info"),
    # measured updates agree
    "measured": (moved(4.0), "warning"),
}

STAYS_SILENT = {
    "constant": jumped(1),
    # the gradient doubles
    "twice": jumped(2),
    # one batch
    "once": jumped(5, until=601),
    # at the first step both moments are corrected for their start
    "first steps": jumped(1000, at=0, until=3),
    # the gradient changes its direction all the time, and updates stay short
    "measured to be short": moved(0.3),
    "beta2 0.99": jumped(1000, betas=(0.9, 0.99)),
    "beta2 0.95": jumped(1000, betas=(0.9, 0.95)),
    # no second moment at all
    "SGD": replace(jumped(100), groups=({"optimizer": "SGD", "lr": RATE, "momentum": 0.9},)),
    # epsilon outweighs v before the jump
    "large epsilon": replace(
        jumped(100), groups=({"optimizer": "Adam", "lr": RATE, "betas": [0.9, 0.999], "eps": 1e-3},)
    ),
}


@pytest.mark.parametrize("history, level", FIRES.values(), ids=FIRES)
def test_fires(history, level):
    """Updates of many learning rates are found at the jump of the gradient, an alarm where they cost something."""
    check_rule(StaleSecondMoment, fires=[history], seeds=(), factors=())
    (finding,) = StaleSecondMoment().check(history)

    assert (level, 600) == (finding.level, finding.first_step)


@pytest.mark.parametrize("history", STAYS_SILENT.values(), ids=STAYS_SILENT)
def test_stays_silent(history):
    """Nothing is found where v keeps up, the jump is over at once, or no v is."""
    assert [] == list(StaleSecondMoment().check(history))


def test_size_is_that_of_adam():
    """For a gradient of one direction the size in learning rates is the closed form of Adam's update after a jump."""
    (finding,) = StaleSecondMoment().check(jumped(1e6))
    ages = np.arange(1, 200)
    start = (1 - 0.999**600) / (1 - 0.999 ** (600 + ages))
    expected = (1 - 0.9**ages) / np.sqrt((1 - 0.999**ages) / (1 - 0.999 ** (600 + ages)))

    assert start.max() < 1
    assert finding.evidence[0].observed == pytest.approx(expected.max(), rel=1e-3)


def test_worse_is_never_milder():
    """A larger jump never lowers the level."""
    check_severity(StaleSecondMoment, [jumped(factor) for factor in (1, 2, 5, 50, 1e4)])
