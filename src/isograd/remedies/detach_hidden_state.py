"""`detach-hidden-state`: a remedy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from isograd._changes import Change
from isograd._history import History
from isograd._remedy import Applicability, Remedy


@dataclass(frozen=True, kw_only=True)
class DetachHiddenState(Remedy):
    """Cut the graph where a state is carried from one step to the next.

    What it does
        The carried state keeps its values and loses its history: truncated backpropagation through time.

    When it helps
        Memory and time per step grow, or gradients run through all earlier steps.

    Risks
        Dependencies longer than one segment are no longer learned.

    Prediction
        `graph_nodes` is the same at every step.

    Sources
        Williams & Peng 1990; PyTorch word language model example (`repackage_hidden`).
    """

    treats: ClassVar[tuple[str, ...]] = ("hidden-state-not-detached",)
    applicability: ClassVar[Applicability] = "advice"
    predicts: ClassVar[tuple[str, Literal["up", "down", "finite"]]] = ("graph_nodes", "down")

    def changes(self, history: History) -> tuple[Change, ...]:
        del history
        return ()

    def code(self, history: History) -> str:
        return (
            "hidden = hidden.detach()  # an LSTM: tuple(h.detach() for h in hidden)\n"
            f"output, hidden = {history.subject}(inputs, hidden)"
        )

    def keras_code(self, history: History) -> str:
        del history
        return "state = keras.ops.stop_gradient(state)  # before the next call"
