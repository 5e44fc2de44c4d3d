"""`clip-gradient-by-history`: a remedy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from isograd import _changes
from isograd._changes import Change
from isograd._history import History
from isograd._program import global_gradient_norms, short
from isograd._remedy import Remedy


@dataclass(frozen=True, kw_only=True)
class ClipGradientByHistory(Remedy):
    """Clip the global norm at a limit learned from the norms so far.

    What it does
        `method=percentile` (AutoClip): the limit is the given percentile of all norms so far. `method=z-score` (ZClip):
        norms beyond `z` standard deviations of a moving average are cut back. Norms that are not finite do not enter.

    When it helps
        Spikes whose scale drifts over a long run, where a fixed limit would soon be wrong.

    Risks
        A low percentile is active at most steps and so also lowers the rate.

    Prediction
        `loss-spike` findings become fewer; `global_grad_norm` loses its upper tail.

    Sources
        Seetharaman et al. 2020, arXiv:2007.14469 (10th percentile); Kumar et al. 2025, ZClip, arXiv:2504.02507 (z 2.5).
    """

    treats: ClassVar[tuple[str, ...]] = ("stale-second-moment", "recurrent-explosion", "learning-rate-too-high")
    predicts: ClassVar[tuple[str, Literal["up", "down", "finite"]]] = ("global_grad_norm", "down")

    method: str = "percentile"
    percentile: float = 10.0
    z: float = 2.5

    def __post_init__(self) -> None:
        if self.method not in ("percentile", "z-score"):
            raise ValueError(f"clip-gradient-by-history: method is percentile or z-score, not {self.method!r}")

    def changes(self, history: History) -> tuple[Change, ...]:
        if self.method == "z-score":
            return (_changes.ClipGradients(method="z-score", limit=self.z),)
        return (_changes.ClipGradients(method="percentile", limit=self.percentile),)

    def code(self, history: History) -> str:
        learned = {
            "percentile": f"np.percentile(norms, {self.percentile:g})",
            "z-score": f"np.mean(norms) + {self.z:g} * np.std(norms)",
        }
        limit = learned[self.method]
        return (
            "norms = []  # before the loop\n\n"
            "loss.backward()\n"
            f"grads = [p.grad for p in {history.subject}.parameters() if p.grad is not None]\n"
            "norm = torch.nn.utils.get_total_norm(grads)\n"
            "if torch.isfinite(norm):\n"
            "    norms.append(norm.item())\n"
            f"    limit = {limit}\n"
            f"    torch.nn.utils.clip_grad_norm_({history.subject}.parameters(), limit)\n"
            "optimizer.step()"
        )

    def keras_code(self, history: History) -> str:
        norms, limit = global_gradient_norms(history), 1.0
        if len(norms):
            spread = np.mean(norms) + self.z * np.std(norms)
            limit = short(float(spread if self.method == "z-score" else np.percentile(norms, self.percentile)))
        return (
            "# as the gradient norms of this run have it:\n"
            f"{history.subject}.optimizer.global_clipnorm = {limit:g}  # after compile, before fit"
        )
