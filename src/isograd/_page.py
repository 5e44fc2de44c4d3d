"""The page of a run: one HTML file with everything inside, or the same page fed by the live server.

Words and numbers are the data's (`_page_data.py`); this module puts data, style and scripts together. The scripts in
`page/script/` are plain JavaScript, joined in their order: no build step, no framework. Charts are drawn by plotly's
own script, which its wheel carries.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

ASSETS = {
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "plotly.min.js": "text/javascript; charset=utf-8",
}
"""What a live page loads, with its content type."""

_SCRIPTS = (
    "numbers",
    "elements",
    "dataset",
    "state",
    "plots",
    "lines",
    "heatmap",
    "depth",
    "verdict",
    "treatments",
    "tables",
    "panel",
    "keys",
    "live",
    "start",
)
"""`page/script/*.js` in the order in which they build on each other."""

_PAGE = files("isograd") / "page"


def render(
    data: Mapping[str, Any] | None = None,
    *,
    live: str | None = None,
    compare: Mapping[str, Any] | str | None = None,
    root: str = "/",
) -> str:
    """The whole page as HTML.

    Args:
        data: what `page_data` gives: the page stands alone and asks the network for nothing.
        live: where the server keeps the run, as in `api/runs/ID`, instead of `data`: the page loads what it needs.
        compare: a second run to lay over the first, in the same form: its data, or its place on the server.
        root: what every address of a live page begins with.

    """
    if (data is None) == (live is None):
        raise ValueError("a page has either its data inside or a place on a server, not both and not neither")
    template = jinja2.Environment(
        loader=jinja2.FunctionLoader(_text), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    ).get_template("page.html")
    return template.render(
        data=data,
        json=None if data is None else _embedded(data),
        compare_json=_embedded(compare) if isinstance(compare, Mapping) else None,
        live=live,
        live_compare=compare if isinstance(compare, str) else None,
        root=root,
        title=_plain(f"{_run(data).get('script') or _run(data).get('id')} · isograd") if data else "isograd",
        # Only a page that stands alone holds these; in a live one the browser keeps them between runs.
        style=Markup(asset("page.css").decode()) if data else "",  # noqa: S704 - our own files
        script=_inline("page.js") if data else "",
        plotly=_inline("plotly.min.js") if data else "",
    )


def asset(name: str) -> bytes:
    """`page.css`, `page.js` or `plotly.min.js`.

    Raises KeyError for any other name.
    """
    if name not in ASSETS:
        raise KeyError(name)
    if name == "plotly.min.js":
        return (files("plotly") / "package_data" / name).read_bytes()
    if name == "page.css":
        return (_PAGE / name).read_bytes()
    parts = "\n".join((_PAGE / "script" / f"{part}.js").read_text(encoding="utf-8") for part in _SCRIPTS)
    return f'(() => {{\n"use strict";\n{parts}\n}})();\n'.encode()


def _run(data: Mapping[str, Any]) -> Mapping[str, Any]:
    return data.get("run") or {}


def _text(name: str) -> str:
    return (_PAGE / name).read_text(encoding="utf-8")


def _embedded(data: Mapping[str, Any]) -> Markup:
    """JSON that no HTML parser can leave early: `<`, `>`, `&` and what is not ASCII are escapes of JSON."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)  # noqa: S704 - nothing is left in it that HTML knows


def _inline(name: str) -> Markup:
    """A script to stand inside `<script>`, whose end it must not spell."""
    return Markup(asset(name).decode().replace("</script", "<\\/script").replace("<!--", "<\\!--"))  # noqa: S704 - ours


def _plain(text: str) -> str:
    """Text that UTF-8 can hold: names of files may carry bytes that are none."""
    return text.encode("utf-8", "replace").decode()
