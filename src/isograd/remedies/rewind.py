"""`rewind`: a remedy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from isograd._changes import Change
from isograd._history import History
from isograd._remedy import Applicability, Remedy


@dataclass(frozen=True, kw_only=True)
class Rewind(Remedy):
    """Go back to a state before the run broke, and leave out the batches that broke it.

    What it does
        Parameters, optimizer and schedule are restored from a checkpoint; the batches between are skipped.
        `isograd run --guard rewind` does it while a run goes on, from snapshots in memory.

    When it helps
        A run that breaks after hours and would break again at the same batches.

    Risks
        Work since the checkpoint is lost; a cause that stays will break the run again.

    Prediction
        `loss` returns to its level before the break.

    Sources
        Chowdhery et al. 2022, arXiv:2204.02311 (about 100 steps back, 200-500 batches skipped).
    """

    treats: ClassVar[tuple[str, ...]] = ("invalid-operation", "stale-second-moment")
    applicability: ClassVar[Applicability] = "advice"
    predicts: ClassVar[tuple[str, Literal["up", "down", "finite"]]] = ("loss", "finite")

    def changes(self, history: History) -> tuple[Change, ...]:
        del history
        return ()

    def code(self, history: History) -> str:
        return (
            "checkpoint = torch.load(path)\n"
            f"{history.subject}.load_state_dict(checkpoint['model'])\n"
            "optimizer.load_state_dict(checkpoint['optimizer'])"
        )

    def keras_code(self, history: History) -> str:
        return f"{history.subject} = keras.models.load_model(path)  # with its optimizer"
