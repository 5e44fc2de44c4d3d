"""The contract of a rule: what a file in `rules/` must provide. It knows neither the catalogue nor the engine."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from isograd._history import History

Level = Literal["info", "warning", "error"]
LEVELS: tuple[Level, ...] = ("info", "warning", "error")

Stage = Literal["data", "loop", "initialization", "architecture", "output", "optimizer", "numerics", "symptom"]
STAGES: tuple[Stage, ...] = (
    "data",
    "loop",
    "initialization",
    "architecture",
    "output",
    "optimizer",
    "numerics",
    "symptom",
)
"""From upstream to downstream: what could have caused what, when two findings start at the same step."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """One number against its limit. `statistic` is a statistic or a quantity derived from one.

    `below`: the fault is to lie under the limit, not over it.
    """

    statistic: str
    observed: float
    limit: float
    step: int
    layer: str | None = None
    below: bool = False

    @property
    def breached(self) -> bool:
        """Whether `observed` lies at or beyond `limit`, on the faulty side."""
        return self.observed <= self.limit if self.below else self.observed >= self.limit


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a rule says about one subject.

    `layers` are names of layers or parameters, most telling first. `first_step` and `last_step` bound the time in
    which it was seen. `message` is one or two sentences with numbers: what, where, since when. `confidence` in
    [0, 1] is the share of such findings that are right.
    """

    name: str
    subject: str
    level: Level
    message: str
    first_step: int
    last_step: int
    layers: tuple[str, ...] = ()
    evidence: tuple[Evidence, ...] = ()
    confidence: float = 0.5


class Rule(ABC):
    """A named fault and how it shows in a `History`.

    A rule is one file in `rules/` with one final, frozen, keyword-only dataclass named after it (`dead_units.py` holds
    `DeadUnits`, known as `dead-units`). Its fields are its options, each with a default. Its docstring is its page,
    with the sections Detects, Why it matters, Decided by, Stays silent when, Remedies, References.

    `stage`: "symptom" for what is seen, otherwise where the cause sits.
    `needs`: statistics without which it cannot look; one that is missing makes the rule *unmeasured*, not silent.
    `uses`: statistics that sharpen it where they exist. It reads no others.
    `explains`: for causes, the symptoms that it accounts for, and the causes that it brings about (a rate that is too
    high kills units): they are shown under it.
    `remedies`: names of remedies that treat it, best first.
    `moves_objective`: a lower loss is then no better one: what it is compared with is made by networks that learn.
    """

    stage: ClassVar[Stage]
    needs: ClassVar[tuple[str, ...]]
    uses: ClassVar[tuple[str, ...]] = ()
    explains: ClassVar[tuple[str, ...]] = ()
    remedies: ClassVar[tuple[str, ...]] = ()
    moves_objective: ClassVar[bool] = False

    @classmethod
    def rule_name(cls) -> str:
        """The kebab-case name: `DeadUnits` is `dead-units`."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", cls.__name__).lower()

    @abstractmethod
    def check(self, history: History) -> Iterator[Finding]:
        """Yield findings; none when all is well. Must not raise on any history that has what `needs` names."""

    def finding(
        self,
        history: History,
        *,
        level: Level,
        message: str,
        first_step: int,
        last_step: int | None = None,
        layers: tuple[str, ...] = (),
        evidence: tuple[Evidence, ...] = (),
        confidence: float = 0.5,
    ) -> Finding:
        """A `Finding` with this rule's name and the history's subject; `last_step` defaults to the last step seen."""
        return Finding(
            name=self.rule_name(),
            subject=history.subject,
            level=level,
            message=message,
            first_step=int(first_step),
            last_step=int(history.num_steps - 1 if last_step is None else last_step),
            layers=layers,
            evidence=evidence,
            confidence=confidence,
        )


@dataclass(frozen=True, kw_only=True)
class Unmeasured:
    """A rule that could not look, the statistic that it missed, and why."""

    rule: str
    missing: str
    why: str


Options = Mapping[str, Mapping[str, object]]
"""Rule name -> option -> value, as `[tool.isograd.rules.<name>]` gives them."""
