"""saturated-discriminator: when it is found, and when it is not."""

from dataclasses import replace

import numpy as np
import pytest

from isograd._history import Event
from isograd.rules.saturated_discriminator import SaturatedDiscriminator
from isograd.testing import altered, check_rule, check_severity, plain_network

STEPS = np.arange(100)
MINIMAX = ("Mean", "Log", "Add", "Rsub", "Sigmoid", "Addmm")
SCORES = ("Add", "BinaryCrossEntropyWithLogits", "Addmm")
FADED = 0.3 * np.exp(-STEPS / 8)
WON = 1.386 * np.exp(-STEPS / 8)


def subject(name, loss, gradient, operations):
    """One of two models."""
    history = altered(plain_network(), loss=loss, global_grad_norm=gradient)
    event = Event(step=0, kind="loss-graph", data={"operations": list(operations)})
    return replace(history, subject=name, events=(event,))


def game(*, loss=None, gradient=FADED, own=MINIMAX, other=WON, others=SCORES):
    """A generator beside a discriminator with this loss."""
    generator = subject("G", -0.5 * WON if loss is None else loss, gradient, own)
    return replace(generator, companions={"D": subject("D", other, other, others)})


NOISY = 1 + 0.1 * np.sin(STEPS * 1.7)

FIRES = {
    # log(1 - D) rises to 0, its worst, and its gradient fades
    "minimax": game(),
    # the same, written with scores
    "scores": game(own=("Neg", "BinaryCrossEntropyWithLogits", "Addmm")),
    # won within a few steps
    "at once": game(
        gradient=np.where(STEPS < 4, 0.3, 1e-5), loss=np.where(STEPS < 4, -0.5, -1e-5), other=np.where(STEPS < 4, 1, 0)
    ),
    # a clamp leaves exactly nothing
    "exactly zero": game(gradient=np.where(STEPS < 30, FADED, 0.0)),
}

STAYS_SILENT = {
    "plain": plain_network(),
    "alone": replace(game(), companions={}),
    # a balanced game
    "balanced": game(loss=0.69 * NOISY, gradient=0.3 * NOISY, other=1.386 * NOISY),
    # the discriminator wins and its opponent's gradient stays
    "not starved": game(loss=0.7 + 0.1 * STEPS, gradient=NOISY),
    # noise has faded to a hundredth
    "smaller": game(gradient=np.maximum(FADED, 0.01)),
    # two classifiers side by side, both done
    "both converge": game(loss=WON, own=SCORES),
    # an actor beside a critic of values
    "critic": game(others=("MseLoss", "Addmm")),
    # a score without an end, as Wasserstein's
    "no probability": game(own=("Neg", "Mean", "Addmm")),
    "discriminator has not won": game(other=1.386 * NOISY),
}


@pytest.mark.parametrize("history", FIRES.values(), ids=FIRES)
def test_fires(history):
    """A generator whose gradient fades while the discriminator wins is an error of the generator's."""
    check_rule(SaturatedDiscriminator, fires=[history], seeds=())
    (finding,) = SaturatedDiscriminator().check(history)

    assert ("error", "G") == (finding.level, finding.subject)
    assert 0 < finding.first_step <= 70


@pytest.mark.parametrize("history", STAYS_SILENT.values(), ids=STAYS_SILENT)
def test_stays_silent(history):
    """Nothing is found where the game is open, the gradient stays, or it is no such game."""
    assert [] == list(SaturatedDiscriminator().check(history))


def test_worse_is_never_milder():
    """A gradient that fades further never lowers the level."""
    check_severity(SaturatedDiscriminator, [game(gradient=0.3 * np.exp(-STEPS / k)) for k in (1e9, 50, 15, 8, 2)])
