"""What `isograd fix` has measured, kept beside the untreated run as `fix.json` so that its page can show it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from isograd._whole_file import write_whole

SCHEMA = 1
"""Number of the form; a reader understands this one and all before it."""

NAME = "fix.json"


def write_fix(folder: Path, facts: Mapping[str, Any]) -> None:
    """Keep `facts`, JSON values, in a run's folder. Raises OSError."""
    text = json.dumps({**facts, "schema": SCHEMA}, allow_nan=False)
    write_whole(folder / NAME, text.encode())


def read_fix(folder: Path) -> dict[str, Any] | None:
    """What was kept in a run's folder; None where nothing was, or nothing that can be read."""
    try:
        facts = json.loads((folder / NAME).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(facts, dict) or not isinstance(facts.get("trials"), list):
        return None
    schema = facts.get("schema")
    return facts if isinstance(schema, int) and 1 <= schema <= SCHEMA else None
