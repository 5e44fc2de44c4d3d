"""The catalogue of symptoms and causes: one file each, found by walking this folder. Nothing is registered by hand."""

from __future__ import annotations

import sys

from isograd._catalog import walk
from isograd._rule import Rule

RULES: dict[str, type[Rule]] = walk(sys.modules[__name__], Rule)  # type: ignore[type-abstract]
"""Every rule by its name."""
