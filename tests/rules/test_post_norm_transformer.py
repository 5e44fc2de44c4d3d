"""post-norm-transformer: when it is found, and when it is not."""

from dataclasses import replace

import numpy as np
import pytest

from isograd._history import Event
from isograd.rules.post_norm_transformer import PostNormTransformer
from isograd.testing import altered, check_rule, check_severity, plain_network

STEPS = np.arange(200)
STUCK = 2.3 + 0.01 * np.sin(STEPS * 1.7)
FALLING = plain_network(steps=200)["loss"].values


def transformer(post_norms, *, shortcuts=12, rate=1e-3, loss=STUCK, kind="attention", **changes):
    """A transformer with so many of its joins normalized behind the join, at these learning rates."""
    network = plain_network(steps=200)
    layers = tuple(replace(entry, kind=kind) if i in (2, 4) else entry for i, entry in enumerate(network.layers))
    rates = np.broadcast_to(np.asarray(rate, dtype=float), 200)[:, None]
    facts = {"products": 40, "shortcuts": shortcuts, "norms": shortcuts, "post_norms": post_norms}
    history = altered(replace(network, layers=layers), learning_rate=rates, loss=loss, **changes)
    return replace(history, events=(Event(step=0, kind="loss-graph", data=facts),))


FIRES = {
    "stuck": (transformer(12), "error"),
    "partly learned": (transformer(12, loss=np.where(STEPS < 20, 2.3 - 0.03 * STEPS, 1.7)), "warning"),
    "lost": (transformer(12, loss=np.where(STEPS > 20, np.nan, 3.0), loss_nonfinite=STEPS > 20), "error"),
    # a schedule that only decays
    "decay": (transformer(12, rate=1e-3 * 0.99**STEPS), "error"),
    # a warm-up over two steps is none
    "two steps": (transformer(12, rate=np.minimum(1.0, (STEPS + 1) / 3) * 1e-3), "error"),
}

STAYS_SILENT = {
    "plain": plain_network(),
    # only the normalization at the very end
    "pre-norm": transformer(1),
    "two blocks": transformer(4, shortcuts=4),
    "learns": transformer(12, loss=FALLING),
    "warm-up": transformer(12, rate=np.minimum(1.0, (STEPS + 1) / 40) * 1e-3),
    # one cycle: from a 25th up to the maximum over a third of the run
    "one cycle": transformer(12, rate=1e-3 * np.interp(STEPS, [0, 60, 199], [0.04, 1, 0])),
    # a residual network of convolutions with normalizations behind the join
    "no attention": transformer(12, kind="conv"),
}


@pytest.mark.parametrize("history, level", FIRES.values(), ids=FIRES)
def test_fires(history, level):
    """Normalization behind the joins of a deep transformer that starts at its full rate and fails is found."""
    check_rule(PostNormTransformer, fires=[history], seeds=())
    (finding,) = PostNormTransformer().check(history)

    assert (level, 0, {"act0", "act1"}) == (finding.level, finding.first_step, set(finding.layers))


@pytest.mark.parametrize("history", STAYS_SILENT.values(), ids=STAYS_SILENT)
def test_stays_silent(history):
    """Nothing is found where shortcuts go on, blocks are few, the rate warms up, or the run learns."""
    assert [] == list(PostNormTransformer().check(history))


def test_deeper_is_never_milder():
    """More normalized joins never lower the level."""
    check_severity(PostNormTransformer, [transformer(joins) for joins in (0, 2, 6, 24)])
