"""What a replayed step has shown, as values that carry sentences. Free of any framework."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Grade = Literal["exact", "within-tolerance", "not-reproducible"]

SHOWN = 8
"""Entries of a list that a sentence names."""

LEAST = 0.01
"""Share of the squared gradient norm from which a sentence names a layer or a row."""


@dataclass(frozen=True, kw_only=True)
class Operand:
    """What an operation was given. `low`, `high`: its finite values' range, NaN where there are none."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    low: float = math.nan
    high: float = math.nan
    nonfinite: int = 0

    def __str__(self) -> str:
        sizes = ", ".join(map(str, self.shape))
        span = "no finite value" if math.isnan(self.low) else f"{self.low:.4g} to {self.high:.4g}"
        lost = f", {self.nonfinite} not finite" if self.nonfinite else ""
        return f"{self.name} ({self.dtype} [{sizes}], {span}{lost})"

    def to_dict(self) -> dict[str, Any]:
        """As JSON of schema 1 has it."""
        return {
            "name": self.name,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "low": number(self.low),
            "high": number(self.high),
            "nonfinite": self.nonfinite,
        }


@dataclass(frozen=True, kw_only=True)
class BadOperation:
    """The first place of a step where a value became non-finite.

    `place`: "operation", or what already held the value when the step began: "input", "weight", "buffer", or "outside"
    for a tensor of the program's own. `operation`: its name without arguments, "log"; `derivative_of`: the operation of
    the forward pass whose derivative it is, "" in the forward pass. `module`: the path of the module that called it, ""
    outside of all. `made`: "nan", "inf" or "-inf"; `count` of `size` entries. `rows` of `num_rows`: those of the batch
    (or of the weight or buffer) that hold such an entry, at most 64 of them; None where there is no axis. `aligned`:
    whether they are such rows; otherwise they are indices of the result's own first axis, pairs of rows say.
    `dropped`: the forward pass leaves these values out again (`where`, a mask) and only the backward pass meets them.
    For what was there before, `operation` and the line are those that read it first.
    """

    place: str = "operation"
    direction: Literal["forward", "backward"] = "forward"
    operation: str
    reason: str
    derivative_of: str = ""
    module: str = ""
    file: str = ""
    line: int = 0
    function: str = ""
    code: str = ""
    made: str = "nan"
    count: int = 0
    size: int = 0
    rows: tuple[int, ...] = ()
    num_bad_rows: int = 0
    num_rows: int | None = None
    aligned: bool = True
    operands: tuple[Operand, ...] = ()
    dropped: bool = False

    @property
    def what(self) -> str:
        """The operation in a few words: "division by 0, in the derivative of sqrt"."""
        return self.reason + (f", in the derivative of {self.derivative_of}" if self.derivative_of else "")

    @property
    def where(self) -> str:
        """The module and the line of the user's source, as far as they are known."""
        module = f"in {self.module}" if self.module else ""
        source = f"{self.file}:{self.line}" if self.file else ""
        return ", ".join(part for part in (module, source) if part)

    def __str__(self) -> str:
        return " ".join(self.sentences())

    def sentences(self) -> Iterator[str]:
        """What, where and how much; with what; which rows."""
        pass_ = f"{self.direction} pass: " if self.place == "operation" else ""
        where = f" {self.where}" if self.module else f" at {self.where}" if self.where else ""
        code = f" `{self.code}`" if self.code else ""
        said = f"{pass_}{self.what}{where}{code}"
        verb = "is" if self.count == 1 else "are"
        yield f"{said[:1].upper()}{said[1:]}: {self.count} of {self.size} values {verb} {self.made}."
        if self.operands:
            yield f"It was given {'; '.join(map(str, self.operands))}."
        if self.dropped:
            yield "The loss leaves them out, the backward pass does not: 0 times NaN is NaN."
        if self.num_bad_rows and (self.num_rows or 0) > 1:
            axis = "" if self.aligned else " (first axis of the result)"
            yield f"{_rows(self.rows, self.num_bad_rows)} of {self.num_rows}{axis}."

    def to_dict(self) -> dict[str, Any]:
        """As JSON of schema 1 has it."""
        plain = {key: value for key, value in vars(self).items() if key not in ("operands", "rows")}
        operands = [operand.to_dict() for operand in self.operands]
        return {**plain, "rows": list(self.rows), "operands": operands, "message": str(self)}


def _rows(rows: Sequence[int], total: int) -> str:
    shown = [str(row) for row in rows[:SHOWN]]
    if total == 1:
        return f"Row {shown[0]}"
    if total > len(shown):
        return f"Rows {', '.join(shown)} and {total - len(shown)} more"
    return f"Rows {', '.join(shown[:-1])} and {shown[-1]}"


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """A layer or a row of the batch, and its share of the squared gradient norm.

    `norm`: of its gradient. `usual`: the median of that norm in the steps before, NaN where it is not known.
    """

    name: str
    share: float
    norm: float
    usual: float = math.nan

    def __str__(self) -> str:
        times = f", {self.norm / self.usual:.3g} times its usual" if self.usual > 0 else ""
        return f"{self.name} {self.share:.1%} (norm {self.norm:.3g}{times})"

    def to_dict(self) -> dict[str, Any]:
        """As JSON of schema 1 has it."""
        return {
            "name": self.name,
            "share": number(self.share),
            "norm": number(self.norm),
            "usual": number(self.usual),
        }


@dataclass(frozen=True, kw_only=True)
class Replay:
    """One captured step, run again.

    `grade`: "exact" (loss and every gradient in the same bits), "within-tolerance" (no further apart than `tolerance`
    allows) or "not-reproducible"; `why` says in a sentence what decided it. `loss`, `grad_norms`: of the replay;
    `captured_loss`: of the run. `difference`: the largest relative one of the loss and the gradient norms; `noise`: the
    same between two replays. `first_bad`: None where everything is finite, or where the microscope found nothing: then
    `notes` say so. `layers`, `rows`: what contributed most to a finite gradient, largest first. `update_norm`:
    how far the optimizer's step moved the parameters, 0 or NaN where none was taken; `finite_after`: whether they are
    finite then. `seconds`: of all runs.
    """

    step: int
    subject: str
    grade: Grade
    why: str
    loss: float
    captured_loss: float
    grad_norms: Mapping[str, float] = field(default_factory=dict)
    difference: float = 0.0
    noise: float = 0.0
    first_bad: BadOperation | None = None
    layers: tuple[Contribution, ...] = ()
    rows: tuple[Contribution, ...] = ()
    notes: tuple[str, ...] = ()
    update_norm: float = math.nan
    finite_after: bool = True
    seconds: float = 0.0

    @property
    def reproduced(self) -> bool:
        """Whether the step is the captured one, exactly or within tolerance."""
        return self.grade != "not-reproducible"

    @property
    def grad_norm(self) -> float:
        """The global gradient norm; NaN or Inf where a gradient is not finite."""
        return math.sqrt(sum(norm * norm for norm in self.grad_norms.values()))

    @property
    def finite(self) -> bool:
        """Whether loss and gradients are."""
        return math.isfinite(self.loss) and all(map(math.isfinite, self.grad_norms.values()))

    def __str__(self) -> str:
        return "\n".join(self.sentences())

    def sentences(self) -> Iterator[str]:
        """What a reader wants to know, in that order: is it the step, what broke, who contributed."""
        grade = {"exact": "exactly", "within-tolerance": "within tolerance"}.get(self.grade)
        done = f"reproduced {grade}" if grade else "not reproduced"
        yield f"Step {self.step} of {self.subject} was {done}: {self.why}"
        yield f"Loss {self.loss:.6g}, gradient norm {self.grad_norm:.6g}."
        if self.first_bad is not None:
            yield from self.first_bad.sentences()
        for what, found in (("Layers", self.layers), ("Rows", self.rows)):
            if found:
                shown = [one for one in found[:SHOWN] if one.share >= LEAST] or found[:1]
                yield f"{what} that contribute most: {'; '.join(map(str, shown))}."
        yield from self.notes

    def to_dict(self) -> dict[str, Any]:
        """As JSON of schema 1 has it; numbers that are not finite are the strings "nan", "inf" and "-inf"."""
        return {
            "schema": 1,
            "step": self.step,
            "subject": self.subject,
            "grade": self.grade,
            "reproduced": self.reproduced,
            "why": self.why,
            "loss": number(self.loss),
            "captured_loss": number(self.captured_loss),
            "grad_norm": number(self.grad_norm),
            "grad_norms": {name: number(norm) for name, norm in self.grad_norms.items()},
            "difference": number(self.difference),
            "noise": number(self.noise),
            "first_bad": None if self.first_bad is None else self.first_bad.to_dict(),
            "layers": [one.to_dict() for one in self.layers],
            "rows": [one.to_dict() for one in self.rows],
            "notes": list(self.notes),
            "update_norm": number(self.update_norm),
            "finite_after": self.finite_after,
            "seconds": self.seconds,
        }


def number(value: float) -> float | str:
    """`value`, or its name where JSON has no number for it."""
    return value if math.isfinite(value) else str(float(value))


def operation_of(data: Mapping[str, Any] | None) -> BadOperation | None:
    """The operation that `BadOperation.to_dict` has told of."""
    if data is None:
        return None
    facts = {key: value for key, value in data.items() if key != "message"}
    operands = tuple(
        Operand(**{**one, "shape": tuple(one["shape"]), "low": float(one["low"]), "high": float(one["high"])})
        for one in facts.pop("operands")
    )
    return BadOperation(**{**facts, "rows": tuple(facts["rows"]), "operands": operands})


def shares_of(data: Sequence[Mapping[str, Any]]) -> tuple[Contribution, ...]:
    """The contributions that their `to_dict` has told of."""
    return tuple(
        Contribution(name=one["name"], **{key: float(one[key]) for key in ("share", "norm", "usual")}) for one in data
    )
