"""accumulation-not-averaged: when it is found, and when it is not."""

from dataclasses import replace

import numpy as np
import pytest

from isograd._history import Event
from isograd.rules.accumulation_not_averaged import AccumulationNotAveraged
from isograd.testing import altered, check_rule, check_severity, plain_network

STEPS = np.arange(100)
FALLING = plain_network()["loss"].values
SUMMED = ["NllLoss", "LogSoftmax", "Addmm"]
AVERAGED = ["Div", *SUMMED]
SGD = {"optimizer": "SGD", "lr": 0.1, "momentum": 0.9}


def accumulated(passes, *, operations=SUMMED, group=SGD, loss=FALLING, scale=1.0, **changes):
    """A network whose steps have so many backward passes, each of a loss that ends in these operations."""
    history = altered(plain_network(), micro_batches=passes, loss=loss, loss_scale=scale, **changes)
    return replace(
        history, groups=(group,), events=(Event(step=0, kind="loss-graph", data={"operations": operations}),)
    )


def lost(passes, **changes):
    """The same, diverging at step 30."""
    return accumulated(
        passes, loss=np.where(STEPS >= 30, np.nan, FALLING + STEPS), loss_nonfinite=STEPS >= 30, **changes
    )


FIRES = {
    "lost": (lost(8), "error"),
    "grown": (accumulated(16, loss=2.3 + 0.5 * STEPS), "error"),
    # the rate allows for the sum
    "trains well": (accumulated(8), "info"),
    # the scaler's own multiplication is no average
    "scaled": (lost(8, operations=["Mul", *SUMMED], scale=65536.0), "error"),
    # stuck, but not by steps that are too long
    "stuck": (accumulated(8, loss=2.3 + 0.01 * np.sin(1.7 * STEPS)), "info"),
}

STAYS_SILENT = {
    "plain": plain_network(),
    "divided": lost(8, operations=AVERAGED),
    "multiplied": lost(8, operations=["Mul", *SUMMED]),
    "divided, then scaled": lost(8, operations=["Mul", *AVERAGED], scale=65536.0),
    # real and generated samples of a discriminator
    "two losses": lost(2),
    # Adam divides the factor out again
    "Adam": lost(8, group={"optimizer": "Adam", "lr": 1e-3, "betas": [0.9, 0.999]}),
    # the last step of an epoch may see fewer or more
    "now and then": lost(np.where(STEPS % 10 == 0, 8, 1)),
    # what the loss is made of is not known
    "no graph": replace(lost(8), events=()),
}


@pytest.mark.parametrize("history, level", FIRES.values(), ids=FIRES)
def test_fires(history, level):
    """A sum of micro-batch gradients is found from the first step, and an alarm only where the loss ran away."""
    check_rule(AccumulationNotAveraged, fires=[history], seeds=())
    (finding,) = AccumulationNotAveraged().check(history)

    assert (level, 0) == (finding.level, finding.first_step)


@pytest.mark.parametrize("history", STAYS_SILENT.values(), ids=STAYS_SILENT)
def test_stays_silent(history):
    """Nothing is found where the loss is divided, the optimizer ignores its scale, or passes are few."""
    assert [] == list(AccumulationNotAveraged().check(history))


def test_more_is_never_milder():
    """More micro-batches never lower the level."""
    check_severity(AccumulationNotAveraged, [lost(passes) for passes in (1, 3, 4, 16, 64)])
