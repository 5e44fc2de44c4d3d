"""`register-parameters`: a remedy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from isograd import _changes
from isograd._changes import Change
from isograd._history import History
from isograd._remedy import Remedy


@dataclass(frozen=True, kw_only=True)
class RegisterParameters(Remedy):
    """Let the model and the optimizer hold all parameters.

    What it does
        Layers in plain lists and dicts become the model's, as in ModuleList and ModuleDict, and the optimizer trains
        every trainable parameter that none holds: as if it had been built after the last change of the model.

    When it helps
        Layers in a plain list or dict; layers replaced after the optimizer was built.

    Risks
        What was left out on purpose, without requires_grad_(False), is trained. Saved optimizer states do not fit the
        new parameter list.

    Prediction
        Every parameter has an `update_norm`.

    Sources
        torch.nn.ModuleList and torch.optim documentation (construct optimizers after moving or replacing).
    """

    treats: ClassVar[tuple[str, ...]] = ("parameters-not-optimized",)
    predicts: ClassVar[tuple[str, Literal["up", "down", "finite"]]] = ("update_norm", "up")

    def changes(self, history: History) -> tuple[Change, ...]:
        del history
        return (_changes.RegisterParameters(),)

    def code(self, history: History) -> str:
        return (
            "self.layers = torch.nn.ModuleList(self.layers)  # in __init__\n"
            "# after the model is complete:\n"
            f"optimizer = torch.optim.SGD({history.subject}.parameters(), lr=lr)"
        )
