"""Weights & Biases: an offline run, to be sent to a server by its user or never."""

from __future__ import annotations

import hashlib
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from isograd._export import Format, points
from isograd._runs import Run


@dataclass(frozen=True, kw_only=True)
class Wandb(Format):
    """Keys are logged at their step, NaN and infinities as they are. Nothing is sent anywhere."""

    needs: ClassVar[str] = "wandb"

    def write(self, run: Run, folder: Path, *, place: Path) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read when wandb is imported
        import wandb

        options: dict[str, Any] = {"console": "off", "silent": True, "disable_git": True, "save_code": False}
        logged = wandb.init(
            project="isograd",
            id=hashlib.sha256(run.id.encode()).hexdigest()[:16],  # the same run again is the same run there
            name=run.id,
            dir=folder,
            mode="offline",
            reinit="create_new",
            config={key: run.meta[key] for key in ("script", "started", "seed", "state") if key in run.meta},
            settings=wandb.Settings(**options, x_disable_stats=True, x_disable_meta=True),
        )
        try:
            for point in points(run):
                logged.log(point.values, step=point.step)
        finally:
            logged.finish()
            wandb.teardown()

    def reading(self, place: Path) -> str:
        return f"wandb sync {shlex.quote(str(place / 'wandb'))}/offline-run-*"
