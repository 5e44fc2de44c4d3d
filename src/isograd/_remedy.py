"""The contract of a remedy: what a file in `remedies/` must provide. It knows neither the catalogue nor frameworks."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, get_args

from isograd._changes import Change
from isograd._history import History
from isograd._rule import Finding

Applicability = Literal["automatic", "opt-in", "advice"]
"""automatic: tried by `isograd fix` · opt-in: tried where it is asked for · advice: a human has to do it."""


class Inapplicable(Exception):
    """A remedy that this program has no place for; the message is one sentence saying why."""


class Remedy(ABC):
    """One way to treat causes: changes to the program, and the code a user would paste.

    A remedy is one file in `remedies/` with one final, frozen, keyword-only dataclass named after it
    (`clip_gradient_norm.py` holds `ClipGradientNorm`, known as `clip-gradient-norm`). Its fields are its options, each
    with a default (numbers, or strings out of a stated set). Its docstring is its page, with the sections What it does,
    When it helps, Risks, Prediction, Sources.

    `treats`: causes, those first that it treats best. `applicability`: see `Applicability`. `predicts`: the statistic
    that must move if it works, and whether "up", "down" or "finite".
    """

    treats: ClassVar[tuple[str, ...]]
    applicability: ClassVar[Applicability] = "automatic"
    predicts: ClassVar[tuple[str, Literal["up", "down", "finite"]]]

    @classmethod
    def remedy_name(cls) -> str:
        """The kebab-case name: `ClipGradientNorm` is `clip-gradient-norm`."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", cls.__name__).lower()

    @classmethod
    def candidates(cls, history: History, cause: Finding | None = None) -> Iterator[Remedy]:
        """This remedy with the options that suit what was measured, best first; at least the defaults.

        `cause`: what it is to treat; None when every remedy is tried whatever the diagnosis.
        """
        del history, cause
        yield cls()

    @property
    def hastens(self) -> bool:
        """Whether any run is faster at first with it, whatever is wrong: beside others, a short run says nothing."""
        return False

    def goes_with(self) -> tuple[str, ...]:
        """Texts of remedies that it is better applied together with: proposed with and without them."""
        return ()

    @abstractmethod
    def changes(self, history: History) -> tuple[Change, ...]:
        """What to change. Raises Inapplicable where the program has no place for it; empty for advice."""

    @abstractmethod
    def code(self, history: History) -> str:
        """PyTorch for the user's own program: names of layers and hyperparameters are those of `history`."""

    @abstractmethod
    def keras_code(self, history: History) -> str:
        """The same for a program that trains with Keras: what it has for this, or where it does so by itself."""

    def code_for(self, history: History) -> str:
        """The code for the framework that the program was seen to train with."""
        return self.keras_code(history) if history.meta.get("framework") == "keras" else self.code(history)

    def __str__(self) -> str:
        """The text that `--apply` takes: `clip-gradient-norm:max_norm=1.0`; options at their defaults are left out."""
        given = [f"{f.name}={value}" for f in fields(self) if (value := getattr(self, f.name)) != f.default]  # type: ignore[arg-type]
        return self.remedy_name() + (":" + ",".join(given) if given else "")


@dataclass(frozen=True, kw_only=True)
class Treatment:
    """Remedies applied together, resolved to changes for one program.

    `cause`: what it is meant to treat, if any. `score` in [0, 1] orders proposals. `code` is what a user would paste.
    """

    remedies: tuple[Remedy, ...]
    changes: tuple[Change, ...]
    cause: str | None = None
    score: float = 0.0
    code: str = ""

    @property
    def texts(self) -> tuple[str, ...]:
        """What `--apply` takes, once for each remedy."""
        return tuple(map(str, self.remedies))

    @property
    def applicability(self) -> Applicability:
        """The least automatic of its remedies'."""
        order = get_args(Applicability)
        return max((remedy.applicability for remedy in self.remedies), key=order.index, default="advice")

    def __str__(self) -> str:
        return " + ".join(self.texts)

    def to_dict(self) -> dict[str, Any]:
        """JSON values; `treatment` is what `--apply` takes, a list where it is several."""
        return {
            "treatment": self.texts[0] if len(self.texts) == 1 else list(self.texts),
            "cause": self.cause,
            "score": self.score,
            "applicability": self.applicability,
            "changes": [str(change) for change in self.changes],
            "code": self.code,
        }
