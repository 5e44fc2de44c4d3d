"""bootstrapped-target: when it is found, and when it is not."""

from dataclasses import replace

import numpy as np
import pytest

from isograd.rules.bootstrapped_target import BootstrappedTarget
from isograd.testing import altered, check_rule, check_severity, plain_network

STEPS = np.arange(100)
PREDICTION, TARGET = 10, 11
RUNAWAY = 0.5 * 10 ** (4 * STEPS / 99)  # four decades
NOISE = np.random.default_rng(0).standard_normal(100)


def values(target, *, answer=None, loss=None, spread=0.3, operation="float32"):
    """Targets and predictions whose means go like this; the loss is 1 % of the squared target by default."""
    answer = 0.98 * target if answer is None else answer
    column = np.arange(12)

    def there(of_target, of_answer):
        return lambda v: np.where(
            column == TARGET, of_target[:, None], np.where(column == PREDICTION, of_answer[:, None], v)
        )

    size = np.hypot(target, spread), np.hypot(answer, spread)
    history = altered(
        plain_network(),
        loss=0.01 * target**2 if loss is None else loss,
        output_rms=there(*size),
        output_mean=there(target, answer),
        output_std=there(np.full(100, spread), np.full(100, spread)),
        output_max=there(target + 2 * spread, answer + 2 * spread),
        output_min=there(target - 2 * spread, answer - 2 * spread),
    )
    layers = list(history.layers)
    layers[TARGET] = replace(layers[TARGET], type=operation)
    return replace(history, layers=tuple(layers))


GROWING = 0.3 + 30 * (1 - np.exp(-STEPS / 40))
SYNCED = 0.3 + 0.5 * (STEPS // 25) ** 4.5  # a target network: targets stand still between its updates

FIRES = {
    # values four decades up, step by step with their targets
    "runaway": (values(RUNAWAY), 0),
    # 100 times the first size (0.5 and twice the spread) is 0.5 * 10^2.34, 40 steps after the start of it
    "late": (values(np.where(STEPS < 30, 0.5, 0.5 * 10 ** ((STEPS - 30) / 17)) + 0.01 * NOISE), 70),
    # up together, fifty times, and no further
    "early": (values(0.5 + 25 * np.minimum(STEPS, 40) / 40, spread=0.1), 0),
}

STAYS_SILENT = {
    "plain": plain_network(),
    # targets come from data, and the predictions run away from them
    "predictions alone": values(1 + 0.1 * NOISE, answer=RUNAWAY, loss=RUNAWAY**2),
    # values grow towards what the rewards allow, and are learned
    "learned values": values(GROWING, loss=0.02 + 0.02 * np.abs(NOISE)),
    # targets that grow far behind the predictions
    "not followed": values(RUNAWAY, answer=np.full(100, 0.5)),
    # a loss that doubles and spikes while a target network is caught up with
    "target network": values(SYNCED, loss=0.1 * (1 + (STEPS % 25 == 1) * 30)),
    # ordinary regression
    "data": values(1 + 0.1 * NOISE, loss=np.exp(-STEPS / 10)),
    "class numbers": values(RUNAWAY, operation="int64"),
}


@pytest.mark.parametrize("history, step", FIRES.values(), ids=FIRES)
def test_fires(history, step):
    """Targets and predictions that run away together are an error, since they were seen to."""
    check_rule(BootstrappedTarget, fires=[history], seeds=())
    (finding,) = BootstrappedTarget().check(history)

    assert ("error", ("target",)) == (finding.level, finding.layers)
    assert abs(finding.first_step - step) <= 5


@pytest.mark.parametrize("history", STAYS_SILENT.values(), ids=STAYS_SILENT)
def test_stays_silent(history):
    """Nothing is found where targets keep their size, are not followed, or the loss stays of its order."""
    assert [] == list(BootstrappedTarget().check(history))


def test_worse_is_never_milder():
    """Targets that grow further never lower the level."""
    check_severity(BootstrappedTarget, [values(0.5 * 10 ** (d * STEPS / 99)) for d in (0, 0.5, 1.5, 3, 6)])
