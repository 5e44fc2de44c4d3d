"""unbalanced-objective: when it is found, and when it is not."""

from dataclasses import replace

import numpy as np
import pytest

from isograd._history import Layer
from isograd.rules.unbalanced_objective import UnbalancedObjective
from isograd.testing import altered, check_rule, check_severity, plain_network

STEPS = np.arange(100)
STUCK = 4.0 + 0.01 * np.sin(STEPS * 1.7)
FALLING = 4.0 * np.exp(-STEPS / 10) + 0.01
PREDICTION, TARGET, WEAK, STRONG = 10, 11, 12, 13


def objective(ratio, *, weak="MseLoss", strong="Mean", answers=0.2, loss=STUCK, mean=0.0, classes=10):
    """A loss of two terms with this ratio of gradients, a number or one for each reading.

    The weaker one's targets have mean 0 and standard deviation 1, its predictions `mean` and `answers`.
    """
    plain = plain_network()
    terms = [
        Layer(name=f"loss.term-{i}", kind="loss-term", role="term", type=t, position=50 + i)
        for i, t in ((1, weak), (2, strong))
    ]
    layers = [*plain.layers, *terms]
    layers[PREDICTION] = replace(layers[PREDICTION], type=weak, units=classes)
    series = {name: replace_columns(s) if s.values.shape[1:] == (12,) else s for name, s in plain.series.items()}
    history = replace(plain, layers=tuple(layers), series=series)
    ratios = np.broadcast_to(np.reshape(ratio, (-1, 1)), (100, 1))
    column = np.arange(14)
    return altered(
        history,
        loss=loss,
        signal_norm=lambda v: np.where(column == WEAK, 0.01, np.where(column == STRONG, 0.01 * ratios, v)),
        output_mean=lambda v: np.where(column == PREDICTION, mean, np.where(column == TARGET, 0.0, v)),
        output_std=lambda v: np.where(column == PREDICTION, answers, np.where(column == TARGET, 1.0, v)),
    )


def replace_columns(series):
    """The same series with two columns more, which were not read."""
    more = np.full((len(series), 2), np.nan)
    return type(series)(series.steps, np.concatenate([series.values, more], axis=1))


UNIFORM = -np.log(10)

FIRES = {
    # a prior that is summed over the batch and everything else, against an averaged error: one constant for all images
    "prior": (objective(1000, strong="Sum"), "error"),
    # it falls, since the strong term does
    "falls": (objective(1000, loss=FALLING), "warning"),
    # at rest the terms pull equally
    "at rest": (objective(np.where(STEPS < 20, 1000, 1)), "error"),
    # prices beside classes, all of which stay equally probable
    "classes": (objective(5000, weak="NllLoss", strong="MseLoss", mean=UNIFORM, answers=0.05), "error"),
    # a formula of the user's, which says nothing of what it learned
    "sum against mean": (objective(300, weak="Mean", strong="Sum"), "error"),
}

STAYS_SILENT = {
    "plain": plain_network(),
    "comparable": objective(5),
    # a small weight, and the task is learned
    "learned": objective(1000, answers=0.95, loss=FALLING),
    "classes learned": objective(1000, weak="NllLoss", mean=4 * UNIFORM, answers=3.0, loss=FALLING),
    # decay of the weights in the loss: no task
    "decay": objective(1e5, weak="Sum", strong="NllLoss", loss=FALLING),
    # an entropy bonus, in a run that is stuck for another reason
    "bonus": objective(1e4, weak="Mean", strong="NllLoss"),
    # a sum drowns a mean, and the run learns
    "sum that learns": objective(300, weak="Mean", strong="Sum", loss=FALLING),
    # out of proportion at the first steps only, and on its way
    "at first": objective(np.where(STEPS < 20, 1000, 3), loss=4 - 0.02 * STEPS),
    "nothing shared": objective(np.nan),
}


@pytest.mark.parametrize("history, level", FIRES.values(), ids=FIRES)
def test_fires(history, level):
    """A drowned task is found with the term that drowns it first, from the first step on."""
    check_rule(UnbalancedObjective, fires=[history], seeds=())
    (finding,) = UnbalancedObjective().check(history)

    assert (level, 0, ("loss.term-2", "loss.term-1")) == (finding.level, finding.first_step, finding.layers)


@pytest.mark.parametrize("history", STAYS_SILENT.values(), ids=STAYS_SILENT)
def test_stays_silent(history):
    """Nothing is found where terms are in proportion, the task is learned, or what is small is no task."""
    assert [] == list(UnbalancedObjective().check(history))


def test_unexplained_is_a_lower_bound():
    """Where the rule says that predictions explain little, the squared error itself is large, whatever they are."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        targets = rng.standard_normal(50) * rng.uniform(0.1, 10) + rng.normal()
        answers = rng.uniform(-1, 1) * targets + rng.normal() * rng.standard_normal(50) + rng.normal()
        gap = (targets.std() - answers.std()) ** 2 + (targets.mean() - answers.mean()) ** 2
        assert gap <= np.mean((targets - answers) ** 2) * (1 + 1e-12)


def test_worse_is_never_milder():
    """A larger ratio never lowers the level."""
    check_severity(UnbalancedObjective, [objective(ratio) for ratio in (1, 50, 200, 1e6)])
