"""broadcast-loss: when it is found, and when it is not."""

from dataclasses import replace

import pytest

from isograd._history import Event
from isograd.rules.broadcast_loss import BroadcastLoss
from isograd.testing import check_rule, plain_network


def graphed(**facts):
    """A network whose loss graph has these facts."""
    return replace(plain_network(), events=(Event(step=0, kind="loss-graph", data=facts),))


def told(prediction, target, *, broadcast=True):
    """A mean squared error of the framework that got these shapes."""
    shapes = {"prediction_shape": prediction, "target_shape": target, "broadcast": broadcast}
    return graphed(operations=["MseLoss", "Expand", "Addmm"], loss={"operation": "MseLoss", **shapes})


def written(*steps):
    """A loss written out: (operation, shape of its result) from the loss down."""
    return graphed(operations=[name for name, _ in steps], shapes=[shape for _, shape in steps])


FIRES = {
    # the target's shape is what it was stretched to, or what it was
    "stretched target": told([64, 1], [64, 64]),
    "own shapes": told([64, 1], [64]),
    "stretched prediction": told([64], [64, 1]),
    # (prediction - target) ** 2 by hand
    "by hand": written(("Mean", []), ("Pow", [32, 32]), ("Sub", [32, 32]), ("Addmm", [32, 1])),
    "squeezed by hand": written(
        ("Mean", []), ("Abs", [32, 32]), ("Sub", [32, 32]), ("Squeeze", [32]), ("Addmm", [32, 1])
    ),
}

STAYS_SILENT = {
    "plain": plain_network(),
    "same shapes": told([64, 1], [64, 1], broadcast=False),
    # one number learned for the whole batch
    "single prediction": told([1], [64]),
    # pairwise distances: the axis was given on purpose
    "pairwise": written(("Mean", []), ("Pow", [32, 32]), ("Sub", [32, 32]), ("Unsqueeze", [32, 1]), ("Addmm", [32, 1])),
    # a target of one column against several predictions, as in mixtures: the prediction keeps its size
    "mixture": written(("Mean", []), ("Sub", [32, 5]), ("Addmm", [32, 5])),
    # a Gram matrix is a product, not a difference
    "gram": written(("Mean", []), ("Mm", [32, 32]), ("Addmm", [32, 8])),
    # one example: everything agrees
    "batch of one": told([1, 1], [1]),
    "shapes unknown": graphed(operations=["Mean", "Sub", "Addmm"]),
}


@pytest.mark.parametrize("history", FIRES.values(), ids=FIRES)
def test_fires(history):
    """Every prediction against every target is an error from the first step."""
    check_rule(BroadcastLoss, fires=[history], seeds=())
    (finding,) = BroadcastLoss().check(history)

    assert ("error", 0) == (finding.level, finding.first_step)


@pytest.mark.parametrize("history", STAYS_SILENT.values(), ids=STAYS_SILENT)
def test_stays_silent(history):
    """Nothing is found where shapes agree or were made to differ on purpose."""
    assert [] == list(BroadcastLoss().check(history))


def test_the_factor_is_said():
    """The message says how many times too many entries were compared."""
    (finding,) = BroadcastLoss().check(FIRES["own shapes"])

    assert "64 times" in finding.message
