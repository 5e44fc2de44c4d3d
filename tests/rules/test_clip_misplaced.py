"""clip-misplaced: when it is found, and when it is not."""

from dataclasses import replace

import numpy as np
import pytest

from isograd._history import Event
from isograd.rules.clip_misplaced import ClipMisplaced
from isograd.testing import altered, check_rule, plain_network

STEPS = np.arange(100)
STUCK = 2.3 + 0.01 * np.sin(STEPS * 1.7)


def clipped_late(limit, *, every=1, **changes):
    """A network whose gradients are clipped behind the step, at every so many steps."""
    history = altered(plain_network(), global_grad_norm=3.0, global_grad_norm_unclipped=3.0, **changes)
    events = [Event(step=int(step), kind="clip-after-step", data={"limit": limit}) for step in STEPS[1::every]]
    return replace(history, events=tuple(events))


def scaled(scale, *, received):
    """Gradients of norm 8 before clipping, clipped by a factor of 1/8, of which the optimizer receives so much."""
    return altered(
        plain_network(),
        loss_scale=scale,
        clip_factor=0.125,
        global_grad_norm_unclipped=8.0,
        global_grad_norm=received,
    )


FIRES = {
    "after the step": (clipped_late(0.5), "warning"),
    "and stuck": (clipped_late(0.5, loss=STUCK), "error"),
    # a limit of 1, applied to gradients that were 65536 times too large
    "before unscaling": (scaled(65536.0, received=1 / 65536), "warning"),
}

STAYS_SILENT = {
    "plain": plain_network(),
    # a way to measure the norm
    "infinite limit": clipped_late(float("inf")),
    # it never would have acted
    "above all gradients": clipped_late(5.0),
    # clipped where it matters as well
    "clipped before": clipped_late(0.5, clip_factor=0.2),
    # now and then, for a log
    "rarely": clipped_late(0.5, every=10),
    "scaled and right": scaled(65536.0, received=1.0),
    "not scaled": scaled(1.0, received=1.0),
}


@pytest.mark.parametrize("history, level", FIRES.values(), ids=FIRES)
def test_fires(history, level):
    """Clipping that has no effect on the step is found from the first gradient that it should have caught."""
    check_rule(ClipMisplaced, fires=[history], seeds=(), factors=())
    (finding,) = ClipMisplaced().check(history)

    assert (level, 0) == (finding.level, finding.first_step)


@pytest.mark.parametrize("history", STAYS_SILENT.values(), ids=STAYS_SILENT)
def test_stays_silent(history):
    """Nothing is found where clipping acts, or would not have."""
    assert [] == list(ClipMisplaced().check(history))
