"""What the hyperparameters of an optimizer's parameter groups say. A group is as `History.groups` gives it."""

from __future__ import annotations

from isograd._history import History

PLAIN = frozenset({"SGD", "ASGD"})
"""Optimizers whose step is proportional to the gradient: a gradient n times as long takes a step n times as long."""


def hyperparameter(history: History, group: int, name: str) -> float:
    """A number of parameter group `group`, NaN where it has none of this name or there is no such group."""
    value = history.groups[group].get(name) if 0 <= group < len(history.groups) else None
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else float("nan")


def decay_rates(history: History, group: int) -> tuple[float, float] | None:
    """(beta1, beta2) of Adam and its kin, None for other optimizers and for values outside [0, 1)."""
    betas = history.groups[group].get("betas") if 0 <= group < len(history.groups) else None
    if not isinstance(betas, (list, tuple)) or len(betas) < 2:
        return None
    first, second = betas[0], betas[1]
    if not all(isinstance(beta, (int, float)) and 0 <= beta < 1 for beta in (first, second)):
        return None
    return float(first), float(second)


def steps_with_gradient(history: History, group: int) -> bool:
    """Whether the group's step is proportional to its gradient."""
    return 0 <= group < len(history.groups) and history.groups[group].get("optimizer") in PLAIN


def members(history: History, group: int) -> list[int]:
    """Indices of the trainable parameters that the group holds."""
    return [i for i, p in enumerate(history.parameters) if p.optimized and p.trainable and p.group == group]
