"""`stabilize-optimizer`: a remedy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from isograd import _changes
from isograd._changes import Change
from isograd._history import History
from isograd._program import hyperparameter, is_seen, rate_in_words
from isograd._remedy import Inapplicable, Remedy
from isograd._rule import Finding


@dataclass(frozen=True, kw_only=True)
class StabilizeOptimizer(Remedy):
    """Give an Adam-like optimizer an epsilon and a memory that suit the gradients.

    What it does
        Sets `eps` and `beta2` where they are given (0 leaves the program's own), and with `clip` shrinks a tensor's
        step where its RMS is larger than `clip` times the learning rate.

    When it helps
        An epsilon that rounds to 0 in half precision; a second moment that lags a jump of the gradient (an update RMS
        up to 1 / sqrt(1 - beta2) = 31.6 learning rates at beta2 = .999).

    Risks
        A large epsilon turns Adam into SGD for small gradients.

    Prediction
        `update_norm` in units of the learning rate falls to about 1.

    Sources
        Wortsman et al. 2023, arXiv:2304.13013 (StableAdamW) and arXiv:2309.14322 (beta2 .95); pytorch/pytorch#8860
        (1e-4).
    """

    treats: ClassVar[tuple[str, ...]] = ("epsilon-too-small", "stale-second-moment")
    predicts: ClassVar[tuple[str, Literal["up", "down", "finite"]]] = ("update_norm", "down")

    eps: float = 0.0
    beta2: float = 0.0
    clip: float = 1.0

    @classmethod
    def candidates(cls, history: History, cause: Finding | None = None) -> Iterator[Remedy]:
        if cause is not None and cause.name == "epsilon-too-small":
            yield cls(eps=1e-4, clip=0.0)
            yield cls(eps=1e-15, clip=0.0)
        else:
            yield cls()
            yield cls(beta2=0.95)

    def changes(self, history: History) -> tuple[Change, ...]:
        if is_seen(history) and hyperparameter(history, "beta2") is None:
            raise Inapplicable("The optimizer keeps no second moment.")
        given = [("eps", self.eps), ("beta2", self.beta2)]
        settings = tuple(_changes.SetHyperparameter(name=name, value=value) for name, value in given if value)
        return (*settings, *((_changes.ClipUpdates(limit=self.clip),) if self.clip else ()))

    def code(self, history: History) -> str:
        lines = ["for group in optimizer.param_groups:"]
        if self.eps:
            lines.append(f"    group['eps'] = {self.eps:g}")
        if self.beta2:
            lines.append(f"    group['betas'] = (group['betas'][0], {self.beta2:g})")
        if not self.clip:
            return "\n".join(lines)
        head = "\n".join(lines) + "\n\n" if len(lines) > 1 else ""
        return (
            f"{head}before = [p.detach().clone() for p in {history.subject}.parameters()]\n"
            "optimizer.step()\n"
            "with torch.no_grad():\n"
            f"    for old, p in zip(before, {history.subject}.parameters()):\n"
            "        rate = optimizer.param_groups[0]['lr']\n"
            "        rms = (p - old).square().mean().sqrt() / rate\n"
            f"        p.copy_(old + (p - old) / (rms / {self.clip:g}).clamp_min(1.0))"
        )

    def keras_code(self, history: History) -> str:
        lines = []
        if self.eps:
            lines.append(f"{history.subject}.optimizer.epsilon = {self.eps:g}  # after compile, before fit")
        if self.beta2:
            lines.append(f"{history.subject}.optimizer.beta_2 = {self.beta2:g}  # after compile, before fit")
        if not self.clip:
            return "\n".join(lines)
        return "\n".join(
            [
                *lines,
                "# the optimizer of Keras that clips its updates by their RMS:",
                "optimizer = keras.optimizers.Adafactor(",
                f"    learning_rate={rate_in_words(history)},",
                "    relative_step=False,",
                f"    clip_threshold={self.clip:g},",
                ")",
                f"{history.subject}.compile(optimizer=optimizer, loss={history.subject}.loss)",
            ]
        )
