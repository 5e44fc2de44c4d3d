"""softmax-over-one-unit: when it is found, and when it is not."""

from dataclasses import replace

import numpy as np
import pytest

from isograd._history import Event, Layer
from isograd.rules.softmax_over_one_unit import SoftmaxOverOneUnit
from isograd.testing import check_rule, plain_network


def headed(operations, sizes, *, kind="softmax", network=None):
    """A network whose loss has this head, its softmaxes over so many entries; the layer stands behind all others."""
    network = network or plain_network()
    facts = {"operations": operations, "softmax_sizes": sizes}
    layer = Layer(name="answer", kind=kind, position=9.5)
    wide = {
        name: replace_width(series) if series.values.shape[1:] == (len(network.layers),) else series
        for name, series in network.series.items()
    }
    return replace(
        network,
        layers=(*network.layers, layer),
        series=wide,
        events=(Event(step=0, kind="loss-graph", data=facts),),
    )


def replace_width(series):
    """One more column, of a layer of which nothing was read."""
    return type(series)(series.steps, np.pad(series.values, ((0, 0), (0, 1)), constant_values=np.nan))


FIRES = {
    # a sigmoid was meant
    "binary": headed(["BinaryCrossEntropy", "Softmax", "Addmm"], [1]),
    # a cross-entropy over one class: its loss is 0 for ever
    "cross-entropy": headed(["NllLoss", "LogSoftmax", "Addmm"], [1], kind="other"),
    # reshaped between the layer and the softmax
    "reshaped": headed(["Mean", "Log", "Softmax", "View", "Addmm"], [1]),
}

STAYS_SILENT = {
    "plain": plain_network(),
    "ten classes": headed(["NllLoss", "LogSoftmax", "Addmm"], [10]),
    # attention over a sequence that has one element: not the answer of the model
    "attention": headed(["Mean", "Sum", "Mul", "Softmax", "Tanh", "Addmm"], [1]),
    # no product was seen: what the softmax is of is not known
    "unknown": headed(["NllLoss", "LogSoftmax"], [1]),
    "not told": headed(["NllLoss", "LogSoftmax", "Addmm"], []),
}


@pytest.mark.parametrize("history", FIRES.values(), ids=FIRES)
def test_fires(history):
    """A softmax over one entry is an error from the step at which it was seen."""
    check_rule(SoftmaxOverOneUnit, fires=[history], seeds=())
    (finding,) = SoftmaxOverOneUnit().check(history)

    assert ("error", 0) == (finding.level, finding.first_step)


@pytest.mark.parametrize("history", STAYS_SILENT.values(), ids=STAYS_SILENT)
def test_stays_silent(history):
    """Nothing is found where there is something to choose from, or where the softmax is not the output's."""
    assert [] == list(SoftmaxOverOneUnit().check(history))


def test_the_layer_is_named():
    """A softmax that is a layer of the model is named."""
    (finding,) = SoftmaxOverOneUnit().check(FIRES["binary"])

    assert ("answer",) == finding.layers
