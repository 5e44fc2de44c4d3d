"""Under which names a program knows the objects that are watched."""

from __future__ import annotations

import traceback
from types import FrameType
from typing import Any

_NOT_USERS = ("torch.", "keras.", "tensorflow.", "jax.", "isograd.")


def variable_name(thing: object, frame: FrameType | None) -> str | None:
    """The name under which a frame, or one that called it, knows `thing`: a variable, or an attribute of `self`.

    The outermost frame counts: it has the script's own name where an inner one has a function's argument.
    """
    frames = [] if frame is None else [frame for frame, _ in traceback.walk_stack(frame)]
    for outer in reversed(frames):
        is_users = not outer.f_globals.get("__name__", "").startswith(_NOT_USERS)
        if is_users and (outer.f_code.co_name == "<module>" or not outer.f_code.co_name.startswith("<")):
            for scope in (outer.f_locals, getattr(outer.f_locals.get("self"), "__dict__", {}), outer.f_globals):
                name = _name_in(scope, thing)
                if name is not None:
                    return name
    return None


def _name_in(scope: Any, thing: object) -> str | None:
    names = (name for name, value in list(scope.items()) if value is thing and isinstance(name, str))
    return next((name for name in names if not name.startswith("_") and name != "self"), None)
