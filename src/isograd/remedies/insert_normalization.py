"""`insert-normalization`: a remedy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, cast, get_args

from isograd import _changes
from isograd._changes import Change, NormalizationKind
from isograd._history import History
from isograd._program import is_seen, weighted
from isograd._remedy import Inapplicable, Remedy
from isograd._rule import Finding


@dataclass(frozen=True, kw_only=True)
class InsertNormalization(Remedy):
    """Normalize the outputs of hidden layers.

    What it does
        `kind`: batch, layer, group (of up to 8 channels) or rms normalization behind every hidden linear or
        convolution.

    When it helps
        Signals whose scale drifts over depth, unscaled inputs, saturation.

    Risks
        Batch normalization alone makes gradients of a plain deep network explode, by 1.21 per layer for large batches
        and more for small ones: add shortcuts. It fails on batches of one or two samples; layer and group normalization
        do not.

    Prediction
        `output_rms` is about 1 at every depth.

    Sources
        Ioffe & Szegedy 2015, arXiv:1502.03167; Ba et al. 2016, arXiv:1607.06450; Wu & He 2018, arXiv:1803.08494; Yang
        et al. 2019, arXiv:1902.08129 (the explosion).
    """

    treats: ClassVar[tuple[str, ...]] = (
        "initialization-too-small",
        "initialization-too-large",
        "saturating-activations",
        "unscaled-inputs",
        "dead-units",
        "invalid-operation",
        "batch-statistics",
    )
    predicts: ClassVar[tuple[str, Literal["up", "down", "finite"]]] = ("output_rms", "up")

    kind: str = "batch"

    def __post_init__(self) -> None:
        if self.kind not in get_args(NormalizationKind):
            known = ", ".join(get_args(NormalizationKind))
            raise ValueError(f"insert-normalization: kind is one of {known}, not {self.kind!r}")

    @classmethod
    def candidates(cls, history: History, cause: Finding | None = None) -> Iterator[Remedy]:
        convolutional = any(layer.kind == "conv" for layer in weighted(history))
        yield cls(kind="batch" if convolutional else "layer")
        yield cls(kind="group" if convolutional else "batch")

    def changes(self, history: History) -> tuple[Change, ...]:
        if is_seen(history) and len(weighted(history)) < 2:
            raise Inapplicable("No hidden layer with weights was seen.")
        return (_changes.InsertNormalization(kind=cast("NormalizationKind", self.kind)),)

    def code(self, history: History) -> str:
        lines = []
        for layer in weighted(history)[:-1]:
            size = layer.units or (layer.shape[-1] if layer.shape else 0)
            made = {
                "batch": f"BatchNorm{'2d' if layer.kind == 'conv' else '1d'}({size})",
                "layer": f"GroupNorm(1, {size})" if layer.kind == "conv" else f"LayerNorm({size})",
                "group": f"GroupNorm({max(g for g in range(1, 9) if not size % g) if size else 1}, {size})",
                "rms": f"RMSNorm({size})",
            }[self.kind]
            lines.append(f"# after {layer.name}: torch.nn.{made}")
        return "\n".join(lines)
