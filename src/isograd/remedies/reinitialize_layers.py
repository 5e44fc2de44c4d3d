"""`reinitialize-layers`: a remedy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, cast, get_args

from isograd import _changes
from isograd._changes import Change, InitializationMethod
from isograd._history import History
from isograd._program import RECURRENT, is_seen, kinds, main_activation, weighted
from isograd._remedy import Inapplicable, Remedy
from isograd._rule import Finding

_BEST = {"relu": "kaiming", "leaky-relu": "kaiming", "elu": "kaiming", "gelu": "critical", "silu": "critical"}
_RECURRENT = ("orthogonal", "chrono", "forget-bias")
_WEIGHTS = "(torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d)"
_ZERO = "if layer.bias is not None: torch.nn.init.zeros_(layer.bias)"
_NO_BIAS = ("    if 'bias' in name and isinstance(layer, torch.nn.RNN):", "        torch.nn.init.zeros_(weight)")
_CODE = {
    "xavier": (_WEIGHTS, "torch.nn.init.xavier_uniform_(layer.weight)", _ZERO),
    "kaiming": (_WEIGHTS, "torch.nn.init.kaiming_normal_(layer.weight)", _ZERO),
    "orthogonal": (
        "(torch.nn.RNN, torch.nn.LSTM, torch.nn.GRU)",
        "for name, weight in layer.named_parameters():",
        "    if 'weight_hh' in name:",
        "        for gate in weight.chunk(weight.shape[0] // weight.shape[1]):",
        "            torch.nn.init.orthogonal_(gate)",
        *_NO_BIAS,
    ),
    "forget-bias": (
        "torch.nn.LSTM",
        "for name, bias in layer.named_parameters():",
        "    if 'bias_ih' in name:",
        "        bias.data[layer.hidden_size : 2 * layer.hidden_size] = 1.0",
    ),
    "identity-recurrence": (
        "torch.nn.RNN",
        "for name, weight in layer.named_parameters():",
        "    if 'weight_hh' in name:",
        "        torch.nn.init.eye_(weight)",
        *_NO_BIAS,
    ),
}

_FILL = "layer.kernel.assign(draw(layer.kernel.shape))"
_KERAS_CODE = {
    "xavier": ('hasattr(layer, "kernel")', "draw = keras.initializers.GlorotUniform()", _FILL),
    "kaiming": ('hasattr(layer, "kernel")', "draw = keras.initializers.HeNormal()", _FILL),
    "orthogonal": (
        "isinstance(layer, keras.layers.RNN)",
        "cell = layer.cell",
        "gates = cell.kernel.shape[1] // cell.units",
        "draws = [keras.initializers.Orthogonal() for gate in range(gates)]",
        "shape = cell.units, cell.units",
        "blocks = [keras.ops.convert_to_numpy(draw(shape)) for draw in draws]",
        "cell.recurrent_kernel.assign(np.concatenate(blocks, axis=1))",
    ),
    "forget-bias": (
        "isinstance(layer, keras.layers.LSTM)",
        "bias = keras.ops.convert_to_numpy(layer.cell.bias).copy()",
        "bias[layer.units : 2 * layer.units] = 1.0",
        "layer.cell.bias.assign(bias)",
    ),
    "identity-recurrence": (
        "isinstance(layer, keras.layers.SimpleRNN)",
        "layer.cell.recurrent_kernel.assign(keras.ops.eye(layer.units))",
    ),
}
"""The same for Keras: the condition on a layer, and what is done with it."""


@dataclass(frozen=True, kw_only=True)
class ReinitializeLayers(Remedy):
    """Draw the weights afresh, at the scale that keeps the signal's size.

    What it does
        `method`: xavier (Var 2 / (fan_in + fan_out)), kaiming (2 / fan_in, for rectifiers), orthogonal (of a recurrent
        model the recurrent matrices, and zero for the biases of plain recurrences), lsuv (orthogonal, then each layer
        scaled to unit output on a batch), critical (weight and bias variance at the critical point of GELU and SiLU),
        fixup (residual branches), forget-bias (LSTM forget gate +1), chrono (gate biases for long memory),
        identity-recurrence (recurrent weights = identity). Matrices of the program's own are drawn where all their
        entries are equal.

    When it helps
        Zero or badly scaled weights; plain deep networks: torch's default draws Var 1 / (3 fan_in), six times too small
        for ReLU, which loses a factor 0.41 of the gradient per layer.

    Risks
        Pretrained weights are lost: it is for training from scratch. Kaiming is wrong for deep GELU or SiLU networks.

    Prediction
        `signal_norm` becomes alike over depth.

    Sources
        Glorot & Bengio 2010; He et al. 2015, arXiv:1502.01852; Saxe et al. 2014, arXiv:1312.6120; Mishkin & Matas 2016,
        arXiv:1511.06422; Roberts, Yaida & Hanin 2022; Zhang et al. 2019, arXiv:1901.09321; Jozefowicz et al. 2015;
        Tallec & Ollivier 2018, arXiv:1804.11188; Le et al. 2015, arXiv:1504.00941.
    """

    treats: ClassVar[tuple[str, ...]] = (
        "zero-initialization",
        "symmetric-initialization",
        "initialization-too-small",
        "initialization-too-large",
        "recurrent-vanishing",
        "recurrent-explosion",
        "dead-units",
        "deep-without-shortcuts",
        "saturating-activations",
    )
    predicts: ClassVar[tuple[str, Literal["up", "down", "finite"]]] = ("signal_norm", "up")

    method: str = "kaiming"

    def __post_init__(self) -> None:
        if self.method not in get_args(InitializationMethod):
            known = ", ".join(get_args(InitializationMethod))
            raise ValueError(f"reinitialize-layers: method is one of {known}, not {self.method!r}")

    @classmethod
    def candidates(cls, history: History, cause: Finding | None = None) -> Iterator[Remedy]:
        recurrent = kinds(history) & RECURRENT
        if recurrent and cause is not None and cause.name.startswith("recurrent"):
            yield from (cls(method=m) for m in _RECURRENT if m == "orthogonal" or any("lstm" in k for k in recurrent))
            return
        first = _BEST.get(main_activation(history), "xavier")
        yield cls(method=first)
        yield cls(method="orthogonal" if history.meta.get("framework") == "keras" else "lsuv")

    def changes(self, history: History) -> tuple[Change, ...]:
        has_matrix = any(len(parameter.shape) > 1 for parameter in history.parameters)
        if is_seen(history) and not weighted(history) and not kinds(history) & RECURRENT and not has_matrix:
            raise Inapplicable("No layer with weights was seen.")
        return (_changes.ReinitializeLayers(method=cast("InitializationMethod", self.method)),)

    def code(self, history: History) -> str:
        body = _CODE.get(self.method)
        if body is None:
            return (
                "import isograd.frameworks.torch\n\n# once, before training:\n"
                f"isograd.frameworks.torch.initialize({history.subject}, {self.method!r})"
            )
        return f"for layer in {history.subject}.modules():\n    if isinstance(layer, {body[0]}):\n" + "\n".join(
            f"        {line}" for line in body[1:]
        )

    def keras_code(self, history: History) -> str:
        body = _KERAS_CODE.get(self.method)
        if body is None:
            # Of those that Keras has no counterpart for, "critical" keeps signals without a batch or blocks to look at.
            method = "critical" if self.method in ("lsuv", "fixup") else self.method
            return (
                "from isograd.frameworks.keras import initialize\n\n"
                f"initialize({history.subject}, {method!r})  # once the model is built"
            )
        return f"for layer in {history.subject}.layers:\n    if {body[0]}:\n" + "\n".join(
            f"        {line}" for line in body[1:]
        )
