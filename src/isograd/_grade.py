"""How well a replayed step agrees with the captured one, in one of three honest grades, and why. No framework."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from isograd._capsule import Capsule
from isograd._replay import Grade, Replay
from isograd._tree import TreeError, number_of

TOLERANCE = 1e-3
"""Relative difference of loss and gradient norms within which a step counts as the same: what Megatron-LM allows when
it runs a step again on kernels that are not deterministic.
"""

NOISE = 3.0
"""What varies from one replay to the next by x may differ from the captured step by so many times x."""

CANCELLED = 1e-3
"""A gradient is compared with this share of the largest one at least: one that cancels to nothing, as that of a bias
before batch normalization, consists of rounding errors.
"""

_ROUNDING = {"bfloat16": 2.0**-7, "float16": 2.0**-10}
"""The spacing of numbers at 1, by type; two of it are allowed where that is more than `TOLERANCE`."""


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What one replay of the step gave.

    `losses`: of its backward passes, in order. `grad_norms`, `grad_hashes`: as a capsule has them. `update_norm`: how
    far the optimizer's step moved the parameters, NaN where it was not taken; `finite_after`: whether they are finite.
    """

    losses: tuple[float, ...] = ()
    grad_norms: Mapping[str, float] = field(default_factory=dict)
    grad_hashes: Mapping[str, str] = field(default_factory=dict)
    update_norm: float = math.nan
    finite_after: bool = True

    def loss(self, captured: float) -> float:
        """That which is nearest to the captured one: the last one, their sum, or their mean. NaN where there is none.

        A step of several backward passes has no loss of its own; which was recorded is told by its value.
        """
        if not self.losses:
            return math.nan
        total = math.fsum(self.losses) if all(map(math.isfinite, self.losses)) else sum(self.losses)
        found = [self.losses[-1], total, total / len(self.losses), *self.losses]
        return min(found, key=lambda loss: _difference(loss, captured)) if captured == captured else found[0]


@dataclass(frozen=True, kw_only=True)
class Judgment:
    """The grade, why in a sentence, the largest relative difference, and that between two replays."""

    grade: Grade
    why: str
    difference: float
    noise: float


def judge(facts: Mapping[str, Any], first: Taken, second: Taken | None, hints: Iterable[str] = ()) -> Judgment:
    """`facts`: of the capsule. `first`, `second`: two replays of it; None where there is only one. `hints`: sentences
    why the step may be another one, told where it is, the likeliest first.
    """
    noise = 0.0 if second is None else max((one[0] for one in _differences(_as_captured(second), first)), default=0.0)
    if _is_exact(facts, first):
        count = len(first.grad_hashes)
        return Judgment(
            grade="exact", why=f"loss and all {count} gradients are the same bits.", difference=0, noise=noise
        )
    others = sorted(_differences(_captured(facts), first), reverse=True)
    worst, where = others[0] if others else (math.inf, "it has neither loss nor gradients to compare")
    allowed = max(tolerance(facts), NOISE * noise if noise < 0.5 else 0.0)
    if worst <= allowed:
        said = f"loss and gradient norms differ by at most {worst:.2g} of their size; two replays by {noise:.2g}."
        return Judgment(grade="within-tolerance", why=said, difference=worst, noise=noise)
    why = [f"{where}.", *([*hints][:1])]
    if noise > tolerance(facts):
        why.insert(1, f"The step itself varies by {noise:.2g} from one replay to the next.")
    return Judgment(grade="not-reproducible", why=" ".join(why), difference=worst, noise=noise)


def graded(
    capsule: Capsule, first: Taken, second: Taken | None, hints: Iterable[str], *, seconds: float, **explained: Any
) -> Replay:
    """The value that users get of a replayed step; `explained` are the fields of `Replay` that no grade depends on."""
    judgment = judge(capsule.facts, first, second, hints)
    captured = loss_of(capsule.facts)
    return Replay(
        step=capsule.step,
        subject=capsule.subject,
        grade=judgment.grade,
        why=judgment.why,
        loss=first.loss(captured),
        captured_loss=captured,
        grad_norms=dict(first.grad_norms),
        difference=judgment.difference,
        noise=judgment.noise,
        update_norm=first.update_norm,
        finite_after=first.finite_after,
        seconds=seconds,
        **explained,
    )


def tolerance(facts: Mapping[str, Any]) -> float:
    """The relative difference that is allowed: by the coarsest type of number that the step computed with."""
    types = {str(one.get("dtype")) for one in facts["parameters"].values() if isinstance(one, dict)}
    calls = [call.get("autocast") for call in facts["calls"] if isinstance(call, dict)]
    types |= {str(value) for kinds in calls if isinstance(kinds, dict) for value in kinds.values()}
    return max([TOLERANCE, *(2 * spacing for name, spacing in _ROUNDING.items() if name in types)])


def _captured(facts: Mapping[str, Any]) -> tuple[float, dict[str, float]]:
    return loss_of(facts), {name: _number(norm) for name, norm in facts["grad_norms"].items()}


def loss_of(facts: Mapping[str, Any]) -> float:
    """The captured loss, NaN where it is not known."""
    return _number(facts.get("loss"))


def _as_captured(taken: Taken) -> tuple[float, dict[str, float]]:
    return taken.losses[-1] if taken.losses else math.nan, dict(taken.grad_norms)


def _number(value: Any) -> float:
    try:
        return number_of(value)
    except TreeError:
        return math.nan


def _is_exact(facts: Mapping[str, Any], taken: Taken) -> bool:
    """Loss and gradients in the same bits. A loss that the capsule does not know is left out."""
    loss = loss_of(facts)
    is_same = facts.get("loss") is None or _difference(taken.loss(loss), loss) == 0
    return is_same and bool(taken.grad_hashes) and dict(taken.grad_hashes) == dict(facts["grad_hashes"])


def _differences(captured: tuple[float, dict[str, float]], taken: Taken) -> Iterator[tuple[float, str]]:
    """(relative difference, what differs in words), of the loss and of every gradient norm."""
    loss, norms = captured
    if loss == loss or any(one != one for one in taken.losses):
        found = taken.loss(loss)
        yield _difference(found, loss), f"the loss is {found:.6g}, in the run it was {loss:.6g}"
    scale = max((norm for norm in norms.values() if math.isfinite(norm)), default=0.0)
    for name in dict.fromkeys([*norms, *taken.grad_norms]):
        was, now = norms.get(name), taken.grad_norms.get(name)
        if was is None:
            yield math.inf, f"{name} has a gradient, in the run it had none"
        elif now is None:
            yield math.inf, f"{name} has no gradient, in the run it had one"
        else:
            said = f"the gradient norm of {name} is {now:.6g}, in the run it was {was:.6g}"
            yield _difference(now, was, floor=CANCELLED * scale), said


def _difference(one: float, other: float, floor: float = 0.0) -> float:
    """Relative to the larger one; 0 for the same, or NaN twice. Below `floor` both count as nothing."""
    if one == other or (one != one and other != other):
        return 0.0
    if not (math.isfinite(one) and math.isfinite(other)):
        return math.inf
    return abs(one - other) / max(abs(one), abs(other), floor)
