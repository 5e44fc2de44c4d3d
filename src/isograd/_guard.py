"""What may be done at a bad step, as users ask for it. No framework, no NumPy: `isograd run` reads it first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Guard:
    """What may be done at a bad step; nothing unless asked for, then it is only recorded.

    `skip`: leave the step out: weights, optimizer state, counters, buffers, schedulers stay as if its batches had not
    existed. `clip`: scale finite gradients that left their range back to its upper end. `rewind`: go back to an
    earlier state where skipping does not end the trouble or the state itself is damaged; batches in between are left
    out. `lower_learning_rate`: when trouble lasts, multiply the rate by this factor (True: 0.5) for the rest of the
    run. `stop`: raise `BadStep` before the damage where nothing else is left to do.

    `patience`: bad steps in a row from which trouble lasts: single bad batches of a share p come so often in a row
    with p^patience, 1e-20 at one in a hundred, so what repeats is not the batch. `rewinds`: how often one trouble is
    rewound before the guard gives up. `memory`: limit of the snapshots in bytes (a quarter of what is free).
    `capsules`: how many bad steps are kept on disk for `isograd replay`.
    """

    skip: bool = False
    clip: bool = False
    rewind: bool = False
    stop: bool = False
    lower_learning_rate: bool | float = False
    patience: int = 10
    rewinds: int = 3
    memory: int | None = None
    capsules: int = 8

    def __post_init__(self) -> None:
        if not 0 <= float(self.lower_learning_rate) <= 1:
            raise ValueError(f"lower_learning_rate is a factor between 0 and 1, not {self.lower_learning_rate!r}")
        for name, least in (("patience", 1), ("rewinds", 0), ("capsules", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be {least} or more, not {getattr(self, name)!r}")
        if self.memory is not None and self.memory <= 0:
            raise ValueError(f"memory must be a number of bytes above 0, not {self.memory!r}")

    @property
    def factor(self) -> float:
        """What the learning rate is multiplied with when trouble lasts; 1 where it is not lowered."""
        if self.lower_learning_rate is True:
            return 0.5
        return float(self.lower_learning_rate) or 1.0


ACTIONS = ("skip", "clip", "rewind", "stop", "lower-learning-rate")
NUMBERS = ("lower-learning-rate", "patience", "rewinds", "memory", "capsules")


def parse_guard(text: str) -> Guard:
    """`skip,rewind,lower-learning-rate=0.5` as a Guard. Raises ValueError, a sentence, for anything else."""
    chosen: dict[str, Any] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, _, value = part.partition("=")
        key = name.strip().replace("-", "_")
        if not value and name in ACTIONS:
            chosen[key] = True
        elif value and key.replace("_", "-") in NUMBERS:
            chosen[key] = _number(key, value)
        else:
            raise ValueError(f"a guard knows {', '.join(ACTIONS)}, and {'=N, '.join(NUMBERS)}=N; not {part!r}")
    if not chosen:
        raise ValueError(f"say what the guard may do: {', '.join(ACTIONS)}")
    return Guard(**chosen)


def _number(key: str, value: str) -> float | int:
    try:
        return float(value) if key == "lower_learning_rate" else int(float(value))
    except (ValueError, OverflowError):
        raise ValueError(f"{key.replace('_', '-')} must be a number, not {value!r}") from None
