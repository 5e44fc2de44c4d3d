"""`remove-output-activation`: a remedy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from isograd import _changes
from isograd._changes import Change
from isograd._history import History
from isograd._loss_graph import loss_graphs
from isograd._remedy import Inapplicable, Remedy

_KINDS = {
    "Softmax": "softmax",
    "LogSoftmax": "log-softmax",
    "Sigmoid": "sigmoid",
    "Tanh": "tanh",
    "Relu": "relu",
    "Hardtanh": "hardtanh",
}


@dataclass(frozen=True, kw_only=True)
class RemoveOutputActivation(Remedy):
    """Take the activation off the model's output.

    What it does
        The output activation passes its input through: the loss applies its own, or the targets need no bound.

    When it helps
        Softmax or sigmoid before a loss that applies it again; a softmax over one unit; a ReLU on scores; a bounded
        output that cannot reach its targets.

    Risks
        The model's answers become scores: apply the activation where probabilities are wanted.

    Prediction
        `signal_norm` of the last layer rises; `loss` falls below its floor.

    Sources
        torch.nn.CrossEntropyLoss and BCEWithLogitsLoss documentation (inputs are logits).
    """

    treats: ClassVar[tuple[str, ...]] = ("double-activation", "bounded-output", "relu-output")
    predicts: ClassVar[tuple[str, Literal["up", "down", "finite"]]] = ("signal_norm", "up")

    def changes(self, history: History) -> tuple[Change, ...]:
        graph = next(iter(loss_graphs(history)), None)
        kind = _KINDS.get(graph.output_operation) if graph is not None else None
        if kind is None:
            raise Inapplicable("No activation was seen between the last layer with weights and the loss.")
        return (_changes.RemoveOutputActivation(kind=kind),)

    def code(self, history: History) -> str:
        graph = next(iter(loss_graphs(history)), None)
        name = graph.output_operation if graph is not None else "activation"
        return f"# return the last layer's result as it is: remove the {name} at the end of {history.subject}.forward"
