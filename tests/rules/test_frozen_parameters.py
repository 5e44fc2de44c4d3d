"""frozen-parameters: when it is found, and when it is not."""

from dataclasses import replace

import numpy as np
import pytest

from isograd.rules.frozen_parameters import FrozenParameters
from isograd.testing import altered, check_rule, plain_network

STUCK = 2.3 + 0.01 * np.sin(np.arange(100) * 1.7)


def frozen(*layers, loss=STUCK, **changes):
    """A network in which these layers do not require a gradient."""
    history = altered(plain_network(), loss=loss, **changes)
    parameters = [replace(p, trainable=p.layer not in layers) for p in history.parameters]
    return replace(history, parameters=tuple(parameters))


BODY = ("linear0", "linear1", "linear2", "linear3")

FIRES = {
    "all but the head": frozen(*BODY),
    "three of five": frozen(*BODY[:3]),
}

STAYS_SILENT = {
    "plain": plain_network(),
    # a head on frozen features, as in fine-tuning
    "learns": frozen(*BODY, loss=plain_network()["loss"].values),
    "one layer": frozen("linear0"),
    "nothing frozen": frozen(),
    # no gradient anywhere: freezing is not what stops it
    "no gradient": frozen(*BODY, grad_max=0.0),
}


@pytest.mark.parametrize("history", FIRES.values(), ids=FIRES)
def test_fires(history):
    """A run that is stuck with most of its weights frozen is warned of."""
    check_rule(FrozenParameters, fires=[history], seeds=())
    (finding,) = FrozenParameters().check(history)

    assert ("warning", "linear0.weight") == (finding.level, finding.layers[0])


@pytest.mark.parametrize("history", STAYS_SILENT.values(), ids=STAYS_SILENT)
def test_stays_silent(history):
    """Nothing is found where the loss falls or most weights train."""
    assert [] == list(FrozenParameters().check(history))
