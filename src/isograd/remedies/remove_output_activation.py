"""`remove-output-activation`: a remedy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from isograd import _changes
from isograd._changes import Change
from isograd._history import History
from isograd._loss_graph import loss_graphs
from isograd._remedy import Inapplicable, Remedy

Target = Literal["identity", "sigmoid", "softmax"]
_KINDS = {
    "Softmax": "softmax",
    "Sigmoid": "sigmoid",
    "Tanh": "tanh",
    "Relu": "relu",
    "Hardtanh": "hardtanh",
}
_APPLIES_ITS_OWN = frozenset({"LogSoftmax", "BinaryCrossEntropyWithLogits"})
_TAKES_ONE_PROBABILITY = frozenset({"BinaryCrossEntropy"})
_TAKES_LOGARITHMS = frozenset({"Log", "Log2", "Log10", "Log1P"})


@dataclass(frozen=True, kw_only=True)
class RemoveOutputActivation(Remedy):
    """Take the activation off the model's output, or put there the one that the loss expects.

    What it does
        The output activation passes its input through: the loss applies its own, or the targets need no bound. Where
        the loss takes probabilities, a sigmoid (binary cross-entropy) or a softmax over classes (the logarithm of a
        score) stands in its place.

    When it helps
        Softmax or sigmoid before a loss that applies it again; a softmax over one unit; a ReLU on scores; a bounded
        output that cannot reach its targets.

    Risks
        The model's answers become scores: apply the activation where probabilities are wanted.

    Prediction
        `signal_norm` of the last layer rises; `loss` falls below its floor.

    Sources
        torch.nn.CrossEntropyLoss, BCELoss and BCEWithLogitsLoss documentation (what inputs are).
    """

    treats: ClassVar[tuple[str, ...]] = (
        "double-activation",
        "bounded-output",
        "relu-output",
        "softmax-over-one-unit",
        "saturated-output",
    )
    predicts: ClassVar[tuple[str, Literal["up", "down", "finite"]]] = ("signal_norm", "up")

    def changes(self, history: History) -> tuple[Change, ...]:
        kind, target = _output(history)
        if kind is None:
            raise Inapplicable("No activation was seen between the last layer with weights and the loss.")
        if kind == target:
            raise Inapplicable(f"The loss takes probabilities, and the output's {kind} makes them.")
        return (_changes.RemoveOutputActivation(kind=kind, target=target),)

    def code(self, history: History) -> str:
        kind, target = _output(history)
        where = f"at the end of {history.subject}.forward"
        if target == "identity":
            return f"# return the last layer's result as it is: remove the {kind or 'activation'} {where}"
        call = "torch.sigmoid(x)" if target == "sigmoid" else "torch.softmax(x, dim=-1)"
        return f"return {call}  # in place of the {kind} {where}"


def _output(history: History) -> tuple[str | None, Target]:
    """The kind of the output activation, and what the operations of the loss behind it take in its place."""
    graph = next(iter(loss_graphs(history)), None)
    kind = _KINDS.get(graph.output_operation) if graph is not None else None
    if graph is None or kind is None:
        return None, "identity"
    behind = frozenset(graph.above_product)
    if behind & _APPLIES_ITS_OWN:
        return kind, "identity"
    if behind & _TAKES_ONE_PROBABILITY:
        return kind, "sigmoid"
    return kind, "softmax" if behind & _TAKES_LOGARITHMS else "identity"
