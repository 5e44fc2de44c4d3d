"""Which programs there are, and what each one says of itself. It runs none of them and needs no framework."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

PROGRAMS = Path(__file__).parent / "programs"
KERAS = PROGRAMS / "keras"

Variant = Literal["faulty", "fixed", "healthy"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One file in `programs/` or `programs/keras/`.

    `accepted`: the causes that count as right, most exact first; a control has none. `harmless`: the program looks
    broken and trains all the same, so that a warning is welcome and an error is wrong. `unreachable`: why nothing but
    another source can repair it; "" where a change from outside may. `backend`: on which the program is run with Keras;
    "" for a PyTorch program.
    """

    name: str
    accepted: tuple[str, ...] = ()
    harmless: bool = False
    unreachable: str = ""
    backend: str = ""

    @property
    def variants(self) -> tuple[Variant, ...]:
        """A fault comes with its repair; a control is healthy as it is."""
        return ("faulty", "fixed") if self.accepted else ("healthy",)

    @property
    def script(self) -> Path:
        """The program's file."""
        return (KERAS if self.backend else PROGRAMS) / f"{self.name}.py"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of one program."""

    case: Case
    variant: Variant
    seed: int

    @property
    def seen(self) -> Path | None:
        """An earlier run of the program that `isograd run` is to find."""
        return None

    @property
    def options(self) -> list[str]:
        """What `isograd run` is given before the script."""
        return []

    @property
    def arguments(self) -> list[str]:
        """What follows the script's name on the command line."""
        return ["--seed", str(self.seed), *(["--fixed"] if self.variant == "fixed" else [])]

    def folder(self, root: Path) -> Path:
        """Where its run is kept."""
        return root / str(self.seed) / f"{self.case.name}-{self.variant}"


def read_cases(folder: Path = PROGRAMS) -> tuple[Case, ...]:
    """Every PyTorch program in `folder`, in alphabetical order; files that begin with an underscore are none.

    Raises ValueError for a program that does not say what is accepted.
    """
    return tuple(_read(path) for path in sorted(folder.glob("[!_]*.py")))


def read_keras_cases(folder: Path = KERAS) -> tuple[Case, ...]:
    """The same of Keras programs. They are run on TensorFlow; a fault that is none there names its BACKEND."""
    return tuple(_read(path, backend="tensorflow") for path in sorted(folder.glob("[!_]*.py")))


def jobs_of(cases: tuple[Case, ...], seeds: tuple[int, ...]) -> tuple[Job, ...]:
    """Every variant of every case, once a seed."""
    return tuple(
        Job(case=case, variant=variant, seed=seed) for seed in seeds for case in cases for variant in case.variants
    )


def _read(path: Path, *, backend: str = "") -> Case:
    constants = {
        target.id: node.value
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    if "ACCEPTED" not in constants:
        raise ValueError(f"{path.name} has no line ACCEPTED = (…): the causes that count as right, () for a control")
    return Case(
        name=path.stem,
        accepted=tuple(ast.literal_eval(constants["ACCEPTED"])),
        harmless="HARMLESS" in constants and bool(ast.literal_eval(constants["HARMLESS"])),
        unreachable=ast.literal_eval(constants["UNREACHABLE"]) if "UNREACHABLE" in constants else "",
        backend=ast.literal_eval(constants["BACKEND"]) if "BACKEND" in constants else backend,
    )
