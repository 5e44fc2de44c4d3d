"""destroyed-labels: when it is found, and when it is not."""

from dataclasses import replace

import numpy as np
import pytest

from isograd._history import Event
from isograd.rules.destroyed_labels import DestroyedLabels
from isograd.testing import altered, check_rule, plain_network

STEPS = np.arange(100)
TARGET = 11
COLLAPSED = 0.7 * np.exp(-STEPS / 4) + 1e-5
CLASSIFIER = ("NllLoss", "LogSoftmax", "Addmm")


def labelled(value, *, distinct=1, batch=32, operations=CLASSIFIER, loss=COLLAPSED, low=None):
    """A network whose batches have this many different labels; `value` is one number or one for each reading."""

    def there(values):
        return lambda v: np.where(np.arange(v.shape[1]) == TARGET, np.reshape(values, (-1, 1)), v)

    history = altered(
        plain_network(),
        loss=loss,
        distinct_values=there(distinct),
        output_min=there(value if low is None else low),
        output_max=there(value),
        output_mean=there(value),
        output_rms=there(np.abs(value)),
    )
    layers = list(history.layers)
    layers[TARGET] = replace(layers[TARGET], shape=(batch,))
    event = Event(step=0, kind="loss-graph", data={"operations": list(operations)})
    return replace(history, layers=tuple(layers), events=(event,))


def beside(history):
    """A second model trains in the same program."""
    return replace(history, companions={"other": plain_network()})


def with_two_targets(history):
    """The loss compares with a second constant."""
    second = history.layers.index(next(layer for layer in history.layers if layer.name == "prediction"))
    layers = list(history.layers)
    layers[second] = replace(layers[second], name="target-2", role="target")
    return replace(history, layers=tuple(layers))


RARE = np.where(STEPS % 30 == 29, 0.3, COLLAPSED)

FIRES = {
    # a cast has rounded all labels down
    "class": labelled(0),
    "binary": labelled(1.0, operations=("BinaryCrossEntropyWithLogits", "Addmm")),
    # a division of integers has left zeros to regress on
    "regression": labelled(0.0, operations=("MseLoss", "Squeeze", "Addmm")),
    "one at a time": labelled(3, batch=8),
    # the same row of several labels for everyone
    "rows": labelled(1.0, low=0.0, operations=("BinaryCrossEntropyWithLogits", "Addmm")),
}

STAYS_SILENT = {
    "plain": plain_network(),
    "two classes": labelled(1, distinct=2),
    # sorted data: each batch holds one class, another one each time
    "sorted": labelled(STEPS // 10),
    # one batch in ten holds a rare other label
    "rare": labelled(0, distinct=np.where(STEPS % 10 == 9, 2, 1)),
    # none was read, but the loss tells of them
    "rare and unseen": labelled(0, loss=RARE),
    # too few examples to say so
    "few": labelled(0, batch=4),
    # the positive pair comes first by construction
    "contrastive": labelled(0, operations=("NllLoss", "LogSoftmax", "Div", "Cat", "Mm")),
    "pairs": labelled(1.0, operations=("BinaryCrossEntropyWithLogits", "Sum", "Mul", "Sub", "Mm")),
    # the residual of an equation is to be zero
    "residual": labelled(0.0, operations=("MseLoss", "Sub", "Mul", "Addmm")),
    "two constants": with_two_targets(labelled(0.0, operations=("MseLoss", "Addmm"))),
    # a generator is to be taken for real
    "beside another model": beside(labelled(1.0, operations=("BinaryCrossEntropyWithLogits", "Addmm"))),
    # a batch of one image and its map of labels
    "single image": labelled(4, low=0, batch=1),
}


@pytest.mark.parametrize("history", FIRES.values(), ids=FIRES)
def test_fires(history):
    """Labels that are all the same are an error from the first step."""
    check_rule(DestroyedLabels, fires=[history], seeds=())
    (finding,) = DestroyedLabels().check(history)

    assert ("error", 0, ("target",)) == (finding.level, finding.first_step, finding.layers)


@pytest.mark.parametrize("history", STAYS_SILENT.values(), ids=STAYS_SILENT)
def test_stays_silent(history):
    """Nothing is found where labels differ somewhere, or are constant by design."""
    assert [] == list(DestroyedLabels().check(history))
