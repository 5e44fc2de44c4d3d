"""`register-parameters`: a remedy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from isograd._changes import Change
from isograd._history import History
from isograd._remedy import Applicability, Remedy


@dataclass(frozen=True, kw_only=True)
class RegisterParameters(Remedy):
    """Let the model and the optimizer hold all parameters.

    What it does
        Layers go into ModuleList, ModuleDict or Parameter; the optimizer is built after the last change of the model.

    When it helps
        Layers in a plain list or dict; layers replaced after the optimizer was built.

    Risks
        Saved optimizer states do not fit the new parameter list.

    Prediction
        Every parameter has an `update_norm`.

    Sources
        torch.nn.ModuleList and torch.optim documentation (construct optimizers after moving or replacing).
    """

    treats: ClassVar[tuple[str, ...]] = ("parameters-not-optimized",)
    applicability: ClassVar[Applicability] = "advice"
    predicts: ClassVar[tuple[str, Literal["up", "down", "finite"]]] = ("update_norm", "up")

    def changes(self, history: History) -> tuple[Change, ...]:
        del history
        return ()

    def code(self, history: History) -> str:
        return (
            "self.layers = torch.nn.ModuleList(self.layers)  # in __init__\n"
            "# after the model is complete:\n"
            f"optimizer = torch.optim.SGD({history.subject}.parameters(), lr=lr)"
        )
