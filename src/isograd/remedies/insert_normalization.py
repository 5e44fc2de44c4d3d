"""`insert-normalization`: a remedy."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal, cast, get_args

from isograd import _changes
from isograd._changes import Change, NormalizationKind
from isograd._history import History, Layer
from isograd._program import NORMALIZATIONS, is_seen, replace_modules, weighted
from isograd._remedy import Inapplicable, Remedy
from isograd._rule import Finding


@dataclass(frozen=True, kw_only=True)
class InsertNormalization(Remedy):
    """Normalize the outputs of hidden layers.

    What it does
        `kind`: batch, layer, group (up to 32 groups) or rms normalization behind every hidden linear or
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
        order = sorted((layer for layer in history.layers if layer.role == "module"), key=lambda layer: layer.position)
        followed = {before.name for before, after in pairwise(order) if after.kind in NORMALIZATIONS}
        hidden = [layer for layer in weighted(history)[:-1] if layer.name not in followed]
        # torch has no module that takes the mean square over axis 1.
        lines = [f"# {x.name}: torch.nn.RMSNorm over its channels" for x in hidden if self._is_by_hand(x)]
        made = {layer.name: self._normalized(layer) for layer in hidden if not self._is_by_hand(layer)}
        return "\n".join(filter(None, [replace_modules(history, made), *lines]))

    def keras_code(self, history: History) -> str:
        order = sorted((layer for layer in history.layers if layer.role == "module"), key=lambda layer: layer.position)
        followed = {before.name for before, after in pairwise(order) if after.kind in NORMALIZATIONS}
        hidden = [layer for layer in weighted(history)[:-1] if layer.name not in followed]
        made = {layer.name: self._keras_layer(layer) for layer in hidden}
        lines = [f"    {key!r}: {value},".replace("'", '"') for key, value in made.items()]
        return "\n".join(
            [
                "normalizations = {",
                *lines,
                "}",
                "",
                "",
                "def normalized(layer, *args, **kwargs):",
                "    if layer.name not in normalizations:",
                "        return layer(*args, **kwargs)",
                "    function, layer.activation = layer.activation, None",
                "    x = normalizations[layer.name](layer(*args, **kwargs))",
                '    name = f"{layer.name}_activation"',
                "    return keras.layers.Activation(function, name=name)(x)",
                "",
                "",
                "# when the model is made, before compile:",
                f"graph = keras.Model({history.subject}.inputs, {history.subject}.outputs)",
                f"{history.subject} = keras.models.clone_model(",
                "    graph, call_function=normalized",
                ")",
            ]
        )

    def _keras_layer(self, layer: Layer) -> str:
        """An expression of the normalization behind a layer."""
        size = layer.units or (layer.shape[-1] if layer.shape else 0)
        if self.kind == "group" or (self.kind == "layer" and layer.kind == "conv"):
            groups = 1 if self.kind == "layer" else math.gcd(32, size)
            return f"keras.layers.GroupNormalization({groups})"
        made = {"batch": "BatchNormalization", "layer": "LayerNormalization", "rms": "RMSNormalization"}[self.kind]
        return f"keras.layers.{made}()"

    def _is_by_hand(self, layer: Layer) -> bool:
        return layer.kind == "conv" and self.kind == "rms"

    def _normalized(self, layer: Layer) -> str:
        """An expression of the layer with its normalization behind it."""
        size, rank = layer.units or (layer.shape[-1] if layer.shape else 0), len(layer.shape)
        if layer.kind == "conv":
            groups = 1 if self.kind == "layer" else math.gcd(32, size)
            group = f"torch.nn.GroupNorm({groups}, {size})"
            batch = f"torch.nn.BatchNorm{max(rank - 2, 1)}d({size})"
            return f"torch.nn.Sequential(layer, {batch if self.kind == 'batch' else group})"
        made = {
            "batch": f"torch.nn.BatchNorm1d({size})",
            "layer": f"torch.nn.LayerNorm({size})",
            "group": f"torch.nn.GroupNorm({math.gcd(32, size)}, {size})",
            "rms": f"torch.nn.RMSNorm({size})",
        }[self.kind]
        if rank > 2 and self.kind in ("batch", "group"):
            # These take features at axis 1: every position is a row of its own, and sequences are as long as here.
            axes = ", ".join(map(str, (-1, *layer.shape[1:-1])))
            made = f"torch.nn.Flatten(0, {rank - 2}), {made}, torch.nn.Unflatten(0, ({axes}))"
        return f"torch.nn.Sequential(layer, {made})"
