"""`insert-shortcuts`: a remedy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal, cast, get_args

from isograd import _changes
from isograd._changes import Change, ShortcutKind
from isograd._history import History
from isograd._program import is_seen, weighted
from isograd._remedy import Inapplicable, Remedy
from isograd._rule import Finding


@dataclass(frozen=True, kw_only=True)
class InsertShortcuts(Remedy):
    """Add a shortcut around every block between equal shapes.

    What it does
        `kind`: residual (x + f(x)), rezero (x + a f(x), a trained from 0) or dense (inputs concatenated).

    When it helps
        Depth itself loses the signal: the shortcut carries the gradient past the block unchanged.

    Risks
        Sums without normalization grow, up to 2^depth for plain residual blocks: rezero starts as the identity and does
        not.

    Prediction
        `signal_norm` of the first layers comes close to the last's.

    Sources
        He et al. 2016, arXiv:1512.03385; Bachlechner et al. 2020, arXiv:2003.04887; Huang et al. 2017,
        arXiv:1608.06993.
    """

    treats: ClassVar[tuple[str, ...]] = (
        "deep-without-shortcuts",
        "saturating-activations",
        "initialization-too-small",
        "oversmoothing",
    )
    predicts: ClassVar[tuple[str, Literal["up", "down", "finite"]]] = ("signal_norm", "up")

    kind: str = "rezero"

    def __post_init__(self) -> None:
        if self.kind not in get_args(ShortcutKind):
            known = ", ".join(get_args(ShortcutKind))
            raise ValueError(f"insert-shortcuts: kind is one of {known}, not {self.kind!r}")

    @classmethod
    def candidates(cls, history: History, cause: Finding | None = None) -> Iterator[Remedy]:
        yield cls()
        yield cls(kind="residual")

    def changes(self, history: History) -> tuple[Change, ...]:
        sizes = [layer.units for layer in weighted(history)]
        if is_seen(history) and not any(a == b for a, b in pairwise(sizes)):
            raise Inapplicable("No two consecutive layers have the same size, so no shortcut fits.")
        return (_changes.InsertShortcuts(kind=cast("ShortcutKind", self.kind)),)

    def code(self, history: History) -> str:
        scale = {
            "residual": "x + block(x)",
            "rezero": "x + self.alpha * block(x)",
            "dense": "torch.cat([x, block(x)], 1)",
        }
        alpha = "self.alpha = torch.nn.Parameter(torch.zeros(()))  # in __init__\n" if self.kind == "rezero" else ""
        return f"{alpha}# in forward, around each block that keeps the shape:\nx = {scale[self.kind]}"

    def keras_code(self, history: History) -> str:
        pairs = pairwise(weighted(history)[:-1])
        names = [f'    "{after.name}",' for before, after in pairs if after.units == before.units]
        scaled = [
            "    scale = keras.layers.EinsumDense(",
            '        "...a,a->...a", y.shape[1:], kernel_initializer="zeros"',
            "    )",
            "    return keras.layers.Add()([x, scale(y)])",
        ]
        joined = {
            "residual": ["    return keras.layers.Add()([x, y])"],
            "rezero": scaled,
            "dense": ["    return keras.layers.Concatenate()([x, y])"],
        }[self.kind]
        return "\n".join(
            [
                "blocks = {",
                *names,
                "}",
                "",
                "",
                "def with_shortcut(layer, x, *args, **kwargs):",
                "    y = layer(x, *args, **kwargs)",
                "    if layer.name not in blocks:",
                "        return y",
                *joined,
                "",
                "",
                "# when the model is made, before compile:",
                f"graph = keras.Model({history.subject}.inputs, {history.subject}.outputs)",
                f"{history.subject} = keras.models.clone_model(",
                "    graph, call_function=with_shortcut",
                ")",
            ]
        )
