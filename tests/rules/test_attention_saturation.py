"""attention-saturation: when it is found, and when it is not."""

from dataclasses import replace

import numpy as np
import pytest

from isograd.rules.attention_saturation import AttentionSaturation
from isograd.testing import altered, check_rule, check_severity, plain_network

STEPS = np.arange(100)
STUCK = 2.3 + 0.01 * np.sin(STEPS * 1.7)
FALLING = plain_network()["loss"].values
GROWING = np.minimum(2.0 * 1.1**STEPS, 300.0)


def attending(entropy, logits, *, loss=STUCK, columns=(2, 4)):
    """A network two of whose layers are attentions of this entropy and these largest logits."""
    network = plain_network()
    layers = tuple(
        replace(entry, kind="attention") if i in columns else entry for i, entry in enumerate(network.layers)
    )
    here = np.isin(np.arange(len(layers)), columns)
    entropy, logits = (np.broadcast_to(np.asarray(value, dtype=float), 100)[:, None] for value in (entropy, logits))
    return altered(
        replace(network, layers=layers),
        attention_entropy=np.where(here, entropy, np.nan),
        attention_logit_max=np.where(here, logits, np.nan),
        loss=loss,
    )


FIRES = {
    # logits grow, entropy collapses as they do
    "grown": (attending(np.where(STEPS < 25, 0.8, 0.01), GROWING), ("error", 25)),
    # not divided by the root of the dimension: so from the start
    "from the start": (attending(0.02, 80.0), ("error", 0)),
    # it had learned before
    "after learning": (
        attending(np.where(STEPS < 40, 0.8, 0.01), GROWING, loss=np.where(STEPS < 40, 2.3 - STEPS / 40, 1.4)),
        ("warning", 40),
    ),
    # no run came back from there, however its loss looks now
    "broken": (attending(0.0, 7e4, loss=FALLING), ("warning", 0)),
}

STAYS_SILENT = {
    "uniform": attending(0.95, 3.0),
    # a lookup that was learned
    "sharp": attending(np.where(STEPS < 25, 0.8, 0.02), np.minimum(GROWING, 40.0), loss=FALLING),
    # sharp by small logits over few keys
    "two keys": attending(0.05, 9.0),
    # large logits that cancel: all keys alike
    "common logit": attending(0.9, 200.0),
    # for a while
    "recovered": attending(np.where((STEPS > 20) & (STEPS < 50), 0.01, 0.8), 100.0),
}


@pytest.mark.parametrize("history, expected", FIRES.values(), ids=FIRES)
def test_fires(history, expected):
    """Attention that sees a single key by logits beyond float32's resolution is found since it does."""
    check_rule(AttentionSaturation, fires=[history], seeds=())
    (finding,) = AttentionSaturation().check(history)

    assert expected == (finding.level, finding.first_step)
    assert {"act0", "act1"} == set(finding.layers)


@pytest.mark.parametrize("history", STAYS_SILENT.values(), ids=STAYS_SILENT)
def test_stays_silent(history):
    """Nothing is found where attention is spread, sharp on purpose, or came back."""
    assert [] == list(AttentionSaturation().check(history))


def test_limit_is_where_float32_forgets_the_others():
    """Ahead by the limit, a weight of float32 is within one rounding of 1, and half of the lead leaves more."""
    lead = np.float32(AttentionSaturation().logits)

    assert np.float32(1) / (np.float32(1) + np.exp(-lead)) >= np.float32(1) - 2 * np.finfo(np.float32).epsneg
    assert np.float32(1) / (np.float32(1) + np.exp(-lead / 2)) < np.float32(1) - 1000 * np.finfo(np.float32).epsneg


def test_larger_is_never_milder():
    """Larger logits never lower the level."""
    check_severity(AttentionSaturation, [attending(0.01, logits) for logits in (1, 10, 20, 1e3, 1e6)])
