"""The catalogue of export formats: one file each, found by walking this folder. Nothing is registered by hand."""

from __future__ import annotations

import sys

from isograd._catalog import walk
from isograd._export import Format

FORMATS: dict[str, type[Format]] = walk(sys.modules[__name__], Format)  # type: ignore[type-abstract]
"""Every format by its name."""
