"""`reconnect-graph`: a remedy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from isograd._changes import Change
from isograd._history import History
from isograd._remedy import Applicability, Remedy


@dataclass(frozen=True, kw_only=True)
class ReconnectGraph(Remedy):
    """Let the gradient reach the parameters.

    What it does
        What cuts the graph is taken out: detach, .item(), numpy, argmax, torch.no_grad, a padding index that is a real
        entry.

    When it helps
        Parameters in the optimizer that never get a gradient.

    Risks
        Deliberately unused branches are fine: leave those out of the optimizer.

    Prediction
        `grad_norm` of the parameters is above 0.

    Sources
        PyTorch "Autograd mechanics"; torch.nn.Embedding documentation (padding_idx).
    """

    treats: ClassVar[tuple[str, ...]] = ("parameters-unreached",)
    applicability: ClassVar[Applicability] = "advice"
    predicts: ClassVar[tuple[str, Literal["up", "down", "finite"]]] = ("grad_norm", "up")

    def changes(self, history: History) -> tuple[Change, ...]:
        del history
        return ()

    def code(self, history: History) -> str:
        del history
        return (
            "weights = scores.softmax(-1)  # without .detach(), .item() or .argmax()\n"
            "# padding_idx only for an index that is no entry\n"
            "embedding = torch.nn.Embedding(num_entries, width)"
        )

    def keras_code(self, history: History) -> str:
        del history
        return (
            "weights = keras.ops.softmax(scores)  # no argmax, no stop_gradient\n"
            "attended = keras.ops.matmul(weights, values)"
        )
