"""unscaled-inputs: when it is found, and when it is not."""

from dataclasses import replace

import numpy as np
import pytest

from isograd.rules.unscaled_inputs import UnscaledInputs
from isograd.testing import altered, check_rule, plain_network

STEPS = np.arange(100)
STUCK = 2.3 + 0.01 * np.sin(STEPS * 1.7)
INPUT, HEAD, TARGET = 0, 9, 11


def fed(rms, *, columns=1.5, **changes):
    """A network with inputs of this root mean square, whose columns differ by this factor."""
    return altered(
        plain_network(activation=changes.pop("activation", "relu")),
        output_rms=lambda v: np.where(np.arange(v.shape[1]) == INPUT, rms, v),
        column_scale_ratio=lambda v: np.where(np.arange(v.shape[1]) == INPUT, columns, v),
        **changes,
    )


def of_type(history, type_):
    """The input's entries are of this type."""
    return replace(history, layers=(replace(history.layers[0], type=type_), *history.layers[1:]))


def embedded(history):
    """The first layer looks its inputs up."""
    layers = [replace(layer, kind="embedding") if layer.name == "linear0" else layer for layer in history.layers]
    return replace(history, layers=tuple(layers))


def inflated(history):
    """The outputs start as large as the inputs."""
    return altered(history, output_rms=lambda v: np.where(np.arange(v.shape[1]) == HEAD, 150.0, v))


FIRES = {
    # inputs about 500: the first tanh is saturated, nothing is learned
    "saturated": (fed(500, activation="tanh", saturation=0.99, loss=STUCK), "error"),
    # pixels of 0 to 255 whose first outputs are in the hundreds, but it recovers
    "pixels, recovering": (inflated(fed(150)), "warning"),
    # columns of 1 and 1e5: nearly all of the gradient belongs to the first layer
    "columns": (fed(5e4, columns=3e4, grad_norm=lambda v: v * np.where(np.arange(10) == 0, 1e3, 1)), "warning"),
    # large inputs that do nothing
    "harmless": (fed(30), "info"),
    # an exponential overflows at once: that is the cause, whatever the inputs would have done
    "overflow": (inflated(fed(120, loss=np.where(STEPS % 2, 1e29, 2e29))), "info"),
    "infinite at once": (fed(120, loss=np.nan, loss_nonfinite=1.0, output_nonfinite=0.0), "info"),
    # updates throw it out of range later
    "overflow by updates": (fed(120, loss=np.where(STEPS < 1, 80, 1e29)), "error"),
    # inputs that overflow by themselves
    "huge": (fed(1e20, loss=1e29 * (1 + 0.1 * np.sin(STEPS))), "error"),
    # the loss is lost
    "lost": (fed(150, loss=np.where(STEPS < 10, 9.0**STEPS, np.nan), loss_nonfinite=STEPS >= 10), "error"),
}

STAYS_SILENT = {
    "plain": plain_network(),
    # 0 to 10, not centered
    "moderate": fed(6, loss=STUCK),
    # one-hot and 0 to 1
    "small": fed(0.2, loss=STUCK),
    # token numbers
    "integers": of_type(fed(5000, loss=STUCK), "int64"),
    # numbers of categories, as floating-point numbers in front of a look-up
    "embedded": embedded(fed(5000, loss=STUCK)),
    # targets are large, inputs are not
    "targets": altered(
        plain_network(), output_rms=lambda v: np.where(np.arange(v.shape[1]) == TARGET, 1e4, v), loss=STUCK
    ),
}


@pytest.mark.parametrize("history, level", FIRES.values(), ids=FIRES)
def test_fires(history, level):
    """Inputs off scale are found, at the level of the harm that they do."""
    check_rule(UnscaledInputs, fires=[history], seeds=())
    (finding,) = UnscaledInputs().check(history)

    assert (level, ("input",)) == (finding.level, finding.layers)


@pytest.mark.parametrize("history", STAYS_SILENT.values(), ids=STAYS_SILENT)
def test_stays_silent(history):
    """Nothing is found where inputs are moderate, or numbers of things."""
    assert [] == list(UnscaledInputs().check(history))
