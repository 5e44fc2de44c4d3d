"""`freeze-parameters`: a remedy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from isograd._changes import Change
from isograd._history import History
from isograd._remedy import Applicability, Remedy


@dataclass(frozen=True, kw_only=True)
class FreezeParameters(Remedy):
    """Freeze the parameters themselves, and hold their layers in evaluation mode.

    What it does
        `requires_grad_(False)` on each parameter before the optimizer is built; `eval()` stops running statistics.

    When it helps
        Code that set an attribute on a module, or froze after gradients had been left in place.

    Risks
        `model.train()` puts the frozen layers into training mode again: call `eval()` on them after it.

    Prediction
        `update_norm` of the frozen parameters is exactly 0.

    Sources
        torch.nn.Module.requires_grad_ documentation; PyTorch "Autograd mechanics", locally disabling gradient
        computation.
    """

    treats: ClassVar[tuple[str, ...]] = ("ineffective-freeze",)
    applicability: ClassVar[Applicability] = "advice"
    predicts: ClassVar[tuple[str, Literal["up", "down", "finite"]]] = ("update_norm", "down")

    def changes(self, history: History) -> tuple[Change, ...]:
        del history
        return ()

    def code(self, history: History) -> str:
        return (
            "backbone.requires_grad_(False)\n"
            "backbone.eval()\n"
            f"trained = [p for p in {history.subject}.parameters() if p.requires_grad]\n"
            "optimizer = torch.optim.SGD(trained, lr=lr)"
        )

    def keras_code(self, history: History) -> str:
        return (
            "backbone.trainable = False\n"
            "# Keras takes notice of it in compile:\n"
            f"{history.subject}.compile(optimizer=optimizer, loss={history.subject}.loss)"
        )
