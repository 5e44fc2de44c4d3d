"""`replace-activations`: a remedy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from isograd import _changes
from isograd._changes import Change
from isograd._history import History
from isograd._program import BOUNDED, hidden_activations, is_seen, kinds, main_activation, replace_modules
from isograd._remedy import Inapplicable, Remedy
from isograd._rule import Finding

_TYPES = {"relu": "ReLU", "leaky-relu": "LeakyReLU", "elu": "ELU", "gelu": "GELU", "silu": "SiLU", "tanh": "Tanh"}


@dataclass(frozen=True, kw_only=True)
class ReplaceActivations(Remedy):
    """Put another activation in the place of the hidden ones.

    What it does
        Bounded activations (sigmoid, tanh, hardtanh, softsign), or rectifiers that die, become `target`; the output's
        stays.

    When it helps
        Saturation: a sigmoid's slope is at most 1/4, so n layers lose at least a factor 4^n where weights are of unit
        gain. Dead units: a leaky slope lets them come back.

    Risks
        The weights' scale has to fit the new activation (see reinitialize-layers); outputs are no longer bounded.

    Prediction
        `activation_slope` rises, `dead_fraction` and `saturation` fall.

    Sources
        Glorot, Bordes & Bengio 2011; Maas et al. 2013; Hendrycks & Gimpel 2016, arXiv:1606.08415; Clevert et al. 2016.
    """

    treats: ClassVar[tuple[str, ...]] = ("saturating-activations", "dead-units", "recurrent-vanishing")
    predicts: ClassVar[tuple[str, Literal["up", "down", "finite"]]] = ("activation_slope", "up")

    target: str = "relu"

    def __post_init__(self) -> None:
        if self.target not in _TYPES:
            raise ValueError(f"replace-activations: target is one of {', '.join(_TYPES)}, not {self.target!r}")

    @classmethod
    def candidates(cls, history: History, cause: Finding | None = None) -> Iterator[Remedy]:
        if main_activation(history) in BOUNDED:
            yield cls()
            yield cls(target="gelu")
        else:
            yield cls(target="leaky-relu")
            yield cls(target="gelu")

    def goes_with(self) -> tuple[str, ...]:
        # Weights keep the signal's size for one activation: torch's default loses it by 0.41 per layer of ReLU.
        return (
            "reinitialize-layers" if self.target in ("relu", "leaky-relu") else "reinitialize-layers:method=critical",
        )

    def changes(self, history: History) -> tuple[Change, ...]:
        known = {*BOUNDED, "relu", "elu", "gelu", "silu"} - {self.target}
        present = {layer.kind for layer in hidden_activations(history)} if is_seen(history) else known
        sources = tuple(sorted(present & known))
        if not sources:
            seen = ", ".join(sorted(kinds(history))) or "none"
            raise Inapplicable(f"No hidden activation to replace with {self.target}: layers seen are {seen}.")
        return (_changes.ReplaceActivations(sources=sources, target=self.target),)

    def code(self, history: History) -> str:
        gone = [layer for layer in hidden_activations(history) if layer.kind != self.target]
        modules = {layer.name: f"torch.nn.{_TYPES[self.target]}()" for layer in gone if layer.role == "module"}
        calls = sorted({layer.type for layer in gone if layer.role == "operation"})
        lines = [f"# in forward: torch.nn.functional.{self.target.replace('-', '_')} in place of {', '.join(calls)}"]
        return "\n".join(filter(None, [replace_modules(history, modules), *(lines if calls else [])]))

    def keras_code(self, history: History) -> str:
        gone = [layer for layer in hidden_activations(history) if layer.kind != self.target]
        owners = {layer.name for layer in history.layers if layer.role == "module"}
        fused = [name for layer in gone if (name := layer.name.rpartition(".")[0]) in owners]
        names = [*(layer.name for layer in gone if layer.role == "module"), *fused]
        function = {"hardtanh": "hard_tanh"}.get(self.target, self.target.replace("-", "_"))
        return "\n".join(
            [
                "gone = {",
                *(f'    "{name}",' for name in names),
                "}",
                "",
                "",
                "def changed(layer):",
                "    config = layer.get_config()",
                '    if layer.name in gone and "activation" in config:',
                f'        config["activation"] = "{function}"',
                "    elif layer.name in gone:",
                f'        return keras.layers.Activation("{function}", name=layer.name)',
                "    return type(layer).from_config(config)",
                "",
                "",
                "# when the model is made, before compile:",
                f"{history.subject} = keras.models.clone_model(",
                f"    {history.subject}, clone_function=changed",
                ")",
            ]
        )
