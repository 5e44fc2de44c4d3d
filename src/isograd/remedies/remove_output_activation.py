"""`remove-output-activation`: a remedy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, cast, get_args

from isograd import _changes
from isograd._changes import Change
from isograd._history import History
from isograd._loss_graph import loss_graphs
from isograd._program import weighted
from isograd._remedy import Inapplicable, Remedy
from isograd._rule import Finding

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
        score) stands in its place. `kind`: softmax, sigmoid, tanh, relu or hardtanh, what stands there; `target`:
        identity, sigmoid or softmax, what is to stand there. Both as seen in the watched program where they are auto.

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

    kind: str = "auto"
    target: str = "auto"

    def __post_init__(self) -> None:
        for option, value, known in (("kind", self.kind, _KINDS.values()), ("target", self.target, get_args(Target))):
            if value not in ("auto", *known):
                words = ", ".join(("auto", *known))
                raise ValueError(f"remove-output-activation: {option} is one of {words}, not {value!r}")

    @classmethod
    def candidates(cls, history: History, cause: Finding | None = None) -> Iterator[Remedy]:
        kind, target = _output(history)
        # Named, so that a program that has not been watched can be given it.
        yield cls() if kind is None else cls(kind=kind, target="auto" if target == "identity" else target)

    def changes(self, history: History) -> tuple[Change, ...]:
        kind, target = self._resolved(history)
        if kind is None:
            raise Inapplicable(
                "No activation was seen between the last layer with weights and the loss; name one, as in kind=softmax."
            )
        if kind == target:
            raise Inapplicable(f"The loss takes probabilities, and the output's {kind} makes them.")
        return (_changes.RemoveOutputActivation(kind=kind, target=target),)

    def code(self, history: History) -> str:
        kind, target = self._resolved(history)
        where = f"at the end of {history.subject}.forward"
        if target == "identity":
            return f"# remove the {kind or 'activation'} {where}:\nreturn x  # the last layer's result"
        call = "torch.sigmoid(x)" if target == "sigmoid" else "torch.softmax(x, dim=-1)"
        return f"# in place of the {kind} {where}:\nreturn {call}"

    def keras_code(self, history: History) -> str:
        kind, target = self._resolved(history)
        new = {"identity": "linear", "sigmoid": "sigmoid", "softmax": "softmax"}[target]
        last = max(weighted(history), key=lambda layer: layer.position, default=None)
        end, model = -1.0 if last is None else last.position, history.subject
        behind = [x.name for x in history.layers if x.role == "module" and x.kind == kind and x.position > end]
        if behind and target == "identity":
            return (
                "# before compile:\n"
                f'output = {model}.get_layer("{behind[-1]}").input\n'
                f"{model} = keras.Model({model}.inputs, output)"
            )
        where = "layers[-1]" if last is None else f'get_layer("{behind[-1] if behind else last.name}")'
        return (
            f"# in place of the {kind or 'activation'}:\n{history.subject}.{where}.activation = keras.activations.{new}"
        )

    def _resolved(self, history: History) -> tuple[str | None, Target]:
        kind, target = _output(history)
        return (
            kind if self.kind == "auto" else self.kind,
            target if self.target == "auto" else cast("Target", self.target),
        )


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
