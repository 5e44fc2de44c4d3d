"""precision-underflow: when it is found, and when it is not."""

from dataclasses import replace

import numpy as np
import pytest

from isograd._number_types import NARROW
from isograd.rules.precision_underflow import PrecisionUnderflow
from isograd.testing import altered, check_rule, check_severity, plain_network

STEPS = np.arange(100)
STUCK = 2.3 + 0.01 * np.sin(STEPS * 1.7)


def narrow(zeros, largest, *, dtype="float16", lost=4, loss=STUCK, steps=STEPS >= 0):
    """A network of this type whose first `lost` linear layers receive gradients of such zeros and largest entries."""
    network = plain_network()
    layers = tuple(replace(layer, dtype=dtype) for layer in network.layers)
    names = [f"linear{i}" for i in range(lost)]
    here = np.isin([layer.name for layer in layers], names) & steps[:, None]
    return altered(
        replace(network, layers=layers),
        signal_max=lambda v: np.where(here, largest, np.where(np.isfinite(v), 1e-3, v)),
        signal_zero_fraction=lambda v: np.where(here, zeros, 0.4),
        loss=loss,
    )


def unsent(loss, *, dtype="float16", scale=1.0):
    """A network of this type in which no gradient arrives, under a loss of this size over 100 rows."""
    return altered(
        narrow(1.0, 0.0, dtype=dtype, lost=5),
        signal_max=lambda v: 0 * v,
        output_size=[100 * max(1, layer.units) for layer in plain_network().layers],
        loss=loss * (1 + 0.01 * np.sin(STEPS)),
        loss_scale=scale,
    )


FIRES = {
    "gone": (narrow(1.0, 0.0), "warning"),
    # a few entries of the smallest numbers are left
    "nearly gone": (narrow(0.95, 2.0**-23), "warning"),
    # the head still gets its gradient and learns a little
    "learning": (narrow(1.0, 0.0, loss=plain_network()["loss"].values ** 0.2), "info"),
    "float8": (narrow(0.95, 2.0**-10, dtype="float8_e4m3fn"), "warning"),
    # half of the time
    "now and then": (narrow(1.0, 0.0, steps=STEPS % 2 == 0), "warning"),
}

STAYS_SILENT = {
    "not read": altered(narrow(0.4, 1e-3), signal_zero_fraction=np.nan),
    # rectifiers and pooling by the maximum
    "usual zeros": narrow(0.875, 1e-3),
    # sparse, and of ordinary size: a mask, a padding
    "sparse": narrow(0.97, 1e-2),
    # small, and all there
    "subnormal": narrow(0.5, 2.0**-20),
    # the range of float32
    "bfloat16": narrow(1.0, 0.0, dtype="bfloat16"),
    "float32": narrow(1.0, 0.0, dtype="float32"),
    # one step in ten
    "rarely": narrow(1.0, 0.0, steps=STEPS % 10 == 0),
    # nothing is left to learn
    "converged": narrow(1.0, 0.0, loss=2.3 * np.exp(-STEPS / 5)),
    # no gradient was ever sent
    "no gradient": altered(narrow(1.0, 0.0), signal_max=lambda v: 0 * v),
}


@pytest.mark.parametrize("history, level", FIRES.values(), ids=FIRES)
def test_fires(history, level):
    """Gradients rounded to zero are found, the layer nearest to the loss first, an alarm where the loss is stuck."""
    # Rescaling the loss moves gradients into the range of the type, or out of it: that is the fault itself.
    check_rule(PrecisionUnderflow, fires=[history], seeds=(), factors=())
    (finding,) = PrecisionUnderflow().check(history)

    assert (level, 0, "linear3") == (finding.level, finding.first_step, finding.layers[0])


@pytest.mark.parametrize("history", STAYS_SILENT.values(), ids=STAYS_SILENT)
def test_stays_silent(history):
    """Nothing is found where zeros are usual, rare or harmless, or the type has the range of float32."""
    assert [] == list(PrecisionUnderflow().check(history))


def test_nothing_sent():
    """A loss too small for the type to send any of it back is an error of the precision, at every layer."""
    check_rule(PrecisionUnderflow, fires=[unsent(1e-6)], seeds=(), factors=())
    (finding,) = PrecisionUnderflow().check(unsent(1e-6))

    assert ("error", "head", 5) == (finding.level, finding.layers[0], len(finding.layers))
    # Of ordinary size it had to arrive: something else cuts it off. A scale lifts it.
    assert [] == [
        f for h in (unsent(2.3), unsent(0.0), unsent(1e-6, scale=65536.0)) for f in PrecisionUnderflow().check(h)
    ]
    assert [] == list(PrecisionUnderflow().check(unsent(1e-6, dtype="bfloat16")))


def test_range_of_float16():
    """The numbers of float16 are those of the type itself."""
    info = np.finfo(np.float16)

    assert info.smallest_subnormal == NARROW["float16"].smallest
    assert info.smallest_normal == NARROW["float16"].smallest_normal
    assert info.max == NARROW["float16"].largest


def test_worse_is_never_milder():
    """More zeros never lower the level."""
    check_severity(PrecisionUnderflow, [narrow(zeros, 1e-7) for zeros in (0.3, 0.85, 0.95, 1.0)])
