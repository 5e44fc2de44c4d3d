"""`clip-gradient-norm`: a remedy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from isograd import _changes
from isograd._changes import Change
from isograd._history import History
from isograd._program import short, typical_gradient_norm
from isograd._remedy import Remedy
from isograd._rule import Finding


@dataclass(frozen=True, kw_only=True)
class ClipGradientNorm(Remedy):
    """Scale all gradients together so that their L2 norm is at most `max_norm`.

    What it does
        g <- g min(1, max_norm / |g|) with one factor for all tensors: the direction is kept.

    When it helps
        Single steps that are far too long: recurrent networks, rare batches, the first steps of a large rate.

    Risks
        It bounds the step and leaves the cause. It does not help against NaN or Inf (one Inf entry would turn into NaN;
        those steps are left alone), and under Adam a clip that is always active changes next to nothing.

    Prediction
        `global_grad_norm` stays at or below `max_norm`.

    Sources
        Pascanu et al. 2013, arXiv:1211.5063 (0.5 to 10 times the typical norm; the median of this run is proposed);
        torch.nn.utils.clip_grad_norm_.
    """

    treats: ClassVar[tuple[str, ...]] = (
        "recurrent-explosion",
        "clip-misplaced",
        "learning-rate-too-high",
        "stale-second-moment",
    )
    predicts: ClassVar[tuple[str, Literal["up", "down", "finite"]]] = ("global_grad_norm", "down")

    max_norm: float = 1.0

    @classmethod
    def candidates(cls, history: History, cause: Finding | None = None) -> Iterator[Remedy]:
        typical = typical_gradient_norm(history)
        if typical > 0 and short(typical) != cls.max_norm:
            yield cls(max_norm=short(typical))
        yield cls()

    def changes(self, history: History) -> tuple[Change, ...]:
        return (_changes.ClipGradients(method="norm", limit=self.max_norm),)

    def code(self, history: History) -> str:
        return (
            "loss.backward()\n"
            f"torch.nn.utils.clip_grad_norm_({history.subject}.parameters(), {self.max_norm:g})  # before the step\n"
            "optimizer.step()"
        )

    def keras_code(self, history: History) -> str:
        return f"{history.subject}.optimizer.global_clipnorm = {self.max_norm:g}  # after compile, before fit"
