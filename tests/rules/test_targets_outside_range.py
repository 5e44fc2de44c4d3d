"""targets-outside-range: when it is found, and when it is not."""

from dataclasses import replace

import numpy as np
import pytest

from isograd.rules.targets_outside_range import TargetsOutsideRange
from isograd.testing import altered, check_rule, check_severity, plain_network

STEPS = np.arange(100)
PREDICTION, TARGET = 10, 11


def labelled(low, high, *, operation="BinaryCrossEntropyWithLogits", **changes):
    """A network whose targets lie between these, each a number or one for each reading, under this loss."""
    history = altered(
        plain_network(),
        output_min=lambda v: np.where(np.arange(v.shape[1]) == TARGET, np.reshape(low, (-1, 1)), v),
        output_max=lambda v: np.where(np.arange(v.shape[1]) == TARGET, np.reshape(high, (-1, 1)), v),
        **changes,
    )
    layers = list(history.layers)
    layers[PREDICTION] = replace(layers[PREDICTION], type=operation)
    return replace(history, layers=tuple(layers))


UNBOUNDED = {"loss": 0.7 - 0.3 * STEPS}

FIRES = {
    # signs instead of probabilities: the loss falls without end
    "signs": (labelled(-1, 1, **UNBOUNDED), ("error", 0)),
    # classes counted from 1
    "from one": (labelled(1, 2, **UNBOUNDED), ("error", 0)),
    # standardized images as targets
    "images": (labelled(-0.42, 2.8), ("warning", 0)),
    # a bad file in the middle of the data
    "once": (labelled(0, np.where(STEPS == 40, 255, 1)), ("warning", 40)),
    # 0 and 1 under a loss of signs
    "no signs": (labelled(0, 1, operation="SoftMarginLoss"), ("warning", 0)),
}

STAYS_SILENT = {
    "plain": plain_network(),
    "labels": labelled(0, 1),
    "smoothed": labelled(0.05, 0.95),
    "one class in the batch": labelled(1, 1),
    # rounding, and resampled images
    "rounding": labelled(-1e-3, 1.001),
    "signs of a soft margin": labelled(-1, 1, operation="SoftMarginLoss"),
    "positives of a soft margin": labelled(1, 1, operation="SoftMarginLoss"),
    # a squared error takes anything
    "regression": labelled(-30, 100, operation="MseLoss"),
    "class numbers": labelled(0, 9, operation="NllLoss"),
}


@pytest.mark.parametrize("history, expected", FIRES.values(), ids=FIRES)
def test_fires(history, expected):
    """Targets that the loss does not allow are found at the step at which they came, as an error where it hurts."""
    check_rule(TargetsOutsideRange, fires=[history], seeds=())
    (finding,) = TargetsOutsideRange().check(history)

    assert (*expected, ("target",)) == (finding.level, finding.first_step, finding.layers)


@pytest.mark.parametrize("history", STAYS_SILENT.values(), ids=STAYS_SILENT)
def test_stays_silent(history):
    """Nothing is found where targets are what the loss takes."""
    assert [] == list(TargetsOutsideRange().check(history))


def test_worse_is_never_milder():
    """Targets further outside never lower the level."""
    check_severity(TargetsOutsideRange, [labelled(0, high) for high in (1, 1.02, 2, 255)])
