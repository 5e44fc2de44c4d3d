"""The catalogue of remedies: one file each, found by walking this folder. Nothing is registered by hand."""

from __future__ import annotations

import sys

from isograd._catalog import walk
from isograd._remedy import Remedy

REMEDIES: dict[str, type[Remedy]] = walk(sys.modules[__name__], Remedy)  # type: ignore[type-abstract]
"""Every remedy by its name."""
