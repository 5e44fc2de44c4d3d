"""undertrained: when it is found, and when it is not."""

from dataclasses import replace

import numpy as np
import pytest

from isograd.rules.undertrained import Undertrained
from isograd.testing import altered, check_rule, plain_network


def run(steps, ratio, *, loss=None, state="finished", **changes):
    """A run of so many steps, each of which changes weights by this share of their size."""
    stuck = 0.7 + 0.02 * np.sin(np.arange(steps) * 1.7)
    history = altered(plain_network(steps=steps), update_ratio=ratio, loss=stuck if loss is None else loss, **changes)
    return replace(history, meta={"state": state})


FIRES = {
    # five epochs of seven batches
    "few epochs": run(35, 2e-3),
    "longer and slower": run(400, 1e-4),
    # it falls, by a few hundredths
    "crawling": run(100, 1e-3, loss=0.7 - 3e-4 * np.arange(100)),
}

STAYS_SILENT = {
    "plain": plain_network(),
    "learns": run(35, 2e-3, loss=2.3 * np.exp(-np.arange(35) / 10)),
    # labels without information: the weights have gone far, to no end
    "random labels": run(400, 2e-3),
    # still going on, or ended by the user
    "running": run(35, 2e-3, state="running"),
    "stopped": run(35, 2e-3, state="stopped"),
    "ten steps": run(10, 2e-3),
    # too small a rate is another cause
    "tiny steps": run(100, 1e-7),
    "no gradient": run(35, 2e-3, grad_max=0.0),
    "diverged": run(35, 2e-3, loss=0.7 * 1.2 ** np.arange(35)),
    # the layers near the input get nothing: more steps would not help
    "vanishing": run(35, 2e-3, signal_norm=lambda v: v * 10.0 ** (np.arange(v.shape[1]) - 12.0)),
    # the rate is zero
    "no steps": run(35, 0.0),
}


@pytest.mark.parametrize("history", FIRES.values(), ids=FIRES)
def test_fires(history):
    """A run that ended near its initialization is warned of, at its end."""
    check_rule(Undertrained, fires=[history], seeds=())
    (finding,) = Undertrained().check(history)

    assert ("warning", history.num_steps - 1) == (finding.level, finding.first_step)


@pytest.mark.parametrize("history", STAYS_SILENT.values(), ids=STAYS_SILENT)
def test_stays_silent(history):
    """Nothing is found where the loss fell, the weights went far, or the run did not end by itself."""
    assert [] == list(Undertrained().check(history))
