"""ineffective-freeze: when it is found, and when it is not."""

from dataclasses import replace

import numpy as np
import pytest

from isograd._history import Event
from isograd.rules.ineffective_freeze import IneffectiveFreeze
from isograd.testing import altered, check_rule, check_severity, plain_network

STEPS = np.arange(100)


def turned(name, step, value):
    return Event(step=step, kind="requires-grad", data={"parameter": name, "value": value})


def frozen(*, moving=True, since=0, optimized=True, events=(), is_frozen=True):
    """A network whose first layer does not require gradients at its end, and moves or does not from a step on."""
    history = plain_network()
    first = [p.layer == "linear0" for p in history.parameters]
    history = altered(
        history, update_norm=lambda v: np.where(np.array(first) & (STEPS >= since)[:, None] & ~np.bool_(moving), 0, v)
    )
    parameters = tuple(
        replace(p, trainable=not is_frozen, optimized=optimized) if p.layer == "linear0" else p
        for p in history.parameters
    )
    return replace(history, parameters=parameters, events=tuple(events))


def marked(module, *, step=0, moving=True):
    """A network with a module whose attribute `requires_grad` is False, its parameters trainable."""
    event = Event(step=step, kind="freeze-attribute", data={"module": module})
    return frozen(is_frozen=False, moving=moving, events=(event,))


LATE = [turned(f"linear0.{kind}", 40, False) for kind in ("weight", "bias")]
BACK = [turned(f"linear0.{kind}", 60, True) for kind in ("weight", "bias")]

FIRES = {
    # `model.linear0.requires_grad = False`
    "attribute": (marked("linear0"), 0),
    "attribute, later": (marked("linear0", step=30), 30),
    # frozen from the start, and the optimizer moves it by weight decay
    "decay": (frozen(), 0),
    # frozen at step 40; momentum and zeroed gradients go on
    "momentum": (frozen(events=LATE), 40),
}

STAYS_SILENT = {
    "plain": plain_network(),
    "frozen": frozen(moving=False),
    "frozen later": frozen(moving=False, since=40, events=LATE),
    # the attribute, and the parameters as well
    "attribute and parameters": replace(frozen(moving=False), events=marked("linear0").events),
    # a mark on a module whose parameters stay for another reason
    "attribute, still": marked("linear0", moving=False),
    # another module whose name begins alike
    "attribute of another": marked("linear"),
    # gradual unfreezing: it moved before and after, not while it was frozen
    "unfrozen": altered(
        frozen(is_frozen=False, events=[*LATE, *BACK]),
        update_norm=lambda v: np.where(((STEPS >= 40) & (STEPS < 60))[:, None] & (np.arange(v.shape[1]) < 2), 0, v),
    ),
    # an average that the program itself writes, held by no optimizer
    "average": frozen(optimized=False),
    # frozen in the last step
    "last step": frozen(events=[turned(f"linear0.{kind}", 99, False) for kind in ("weight", "bias")]),
}


@pytest.mark.parametrize("history, step", FIRES.values(), ids=FIRES)
def test_fires(history, step):
    """Parameters that move although the program meant to freeze them are a warning from when it did."""
    check_rule(IneffectiveFreeze, fires=[history], seeds=())
    (finding,) = IneffectiveFreeze().check(history)

    assert ("warning", step, ("linear0.weight", "linear0.bias")) == (finding.level, finding.first_step, finding.layers)


@pytest.mark.parametrize("history", STAYS_SILENT.values(), ids=STAYS_SILENT)
def test_stays_silent(history):
    """Nothing is found where frozen parameters stay, are unfrozen, or are no optimizer's."""
    assert [] == list(IneffectiveFreeze().check(history))


def test_longer_is_never_milder():
    """A freeze that fails for longer never lowers the level."""
    check_severity(IneffectiveFreeze, [marked("linear0", step=step) for step in (99, 90, 50, 0)])
