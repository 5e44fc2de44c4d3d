"""Draw a model's weights afresh. The random numbers come from a stream of their own, and the mathematics from `nn.init`
wherever torch has it; which gain a layer needs is decided by the activation behind it.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import init

from isograd import _changes
from isograd._changes import CannotApply
from isograd._theory import critical_variances
from isograd.frameworks.torch import _describe as describe
from isograd.frameworks.torch import _passage as passages
from isograd.frameworks.torch._passage import Passage
from isograd.frameworks.torch._surgery import ModelEffect, Site

_RECTIFIERS = ("relu", "leaky-relu", "elu", "gelu", "silu")  # selu keeps variances with gain 1 (Klambauer et al. 2017)
_RECURRENT = ("rnn", "lstm", "gru", "rnn-cell", "lstm-cell", "gru-cell")
_WEIGHTED = ("linear", "conv")


@contextlib.contextmanager
def own_randomness() -> Iterator[None]:
    """Random numbers from a stream derived from the program's seed; the program's own stands where it stood.

    Generators are seeded one by one: `torch.manual_seed` would also seed devices that the program has yet to wake.
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=list(devices)):
        # Going on in the program's own stream would give the weights the numbers that its data will have.
        seed = (torch.initial_seed() ^ 0x9E3779B97F4A7C15) % 2**63
        for generator in (torch.default_generator, *(torch.cuda.default_generators[device] for device in devices)):
            generator.manual_seed(seed)
        yield


class Reinitialization(ModelEffect):
    """`ReinitializeLayers`. It can be undone until the first step; then the weights have moved on from there.

    Matrices of the program's own (in modules of its own classes, or in none) are drawn where all their entries are
    equal: nothing else tells that they are meant to be random.
    """

    left = "Reinitialized weights have been trained since: the old ones are gone."

    def __init__(self, change: _changes.ReinitializeLayers, site: Site, back: ExitStack) -> None:
        layers = [module for _, module in site.layers((*_WEIGHTED, *_RECURRENT), change.layers)]
        drawn: list[Tensor] = [p for layer in layers for p in layer.parameters(recurse=False)]
        equal = [] if change.layers else list(_equal_matrices(site, {id(parameter) for parameter in drawn}))
        drawn += equal
        self._before = [(parameter, parameter.detach().clone()) for parameter in drawn]
        back.callback(self._put_back)
        with torch.no_grad(), own_randomness():
            if layers or not equal:
                back.callback(draw(site.root, site.passage, layers, change.method))
            for matrix in equal:
                init.xavier_uniform_(matrix)  # the same for both orientations
        self.detail = f"{len(layers)} layers" + f" and {len(equal)} matrices of one value" * bool(equal)

    def unmet(self) -> str | None:
        self._before = []
        return None

    def _put_back(self) -> None:
        with torch.no_grad():
            for parameter, before in self._before:
                parameter.copy_(before)


def _equal_matrices(site: Site, known: set[int]) -> Iterator[Tensor]:
    """Trained matrices outside of torch's own layers, `known` ones left out, that have one value in all places."""
    own = [m for _, m in describe.walk(site.root) if not type(m).__module__.startswith("torch.nn")]
    for parameter in (*site.loose, *(p for module in own for p in module.parameters(recurse=False))):
        if id(parameter) in known:
            continue
        is_matrix = parameter.requires_grad and parameter.dim() > 1 and min(parameter.shape) > 1
        if is_matrix and parameter.is_floating_point() and parameter.numel() and parameter.min() == parameter.max():
            yield parameter


def initialize(model: nn.Module, method: _changes.InitializationMethod) -> None:
    """Draw a model's weights afresh: xavier, kaiming, orthogonal, lsuv, critical, fixup, forget-bias, chrono or
    identity-recurrence. "lsuv" and "chrono" finish with the first batch. Raises CannotApply where nothing fits.
    """
    layers = [m for _, m in describe.walk(model) if describe.kind_of(m) in (*_WEIGHTED, *_RECURRENT)]
    passage = Passage(model)

    def leave() -> None:
        if passage.afterwards in ([], [leave]):  # "lsuv" waits there for the first batch
            passage.release()

    try:
        with torch.no_grad():
            draw(model, passage, layers, method)
    finally:
        leave()
        passage.afterwards.append(leave)


def draw(root: nn.Module, passage: Passage, layers: Sequence[nn.Module], method: str) -> Callable[[], None]:
    """Draw weights of `layers`; returns how to end what waits for the first batch.

    "orthogonal" is for the recurrent matrices of a model that has some (they are applied once per time step).
    """
    weighted = [layer for layer in layers if describe.kind_of(layer) in _WEIGHTED and _has_weight(layer)]
    recurrent = [layer for layer in layers if describe.kind_of(layer) in _RECURRENT]
    if method in ("forget-bias", "chrono", "identity-recurrence"):
        return _draw_recurrent(recurrent, method)
    if method == "fixup":
        _draw_fixup(root, passage, weighted)
        return _nothing
    if not weighted and not recurrent:
        raise CannotApply("There is no layer with weights to draw.")
    if method == "orthogonal" and recurrent:
        for layer in recurrent:
            for weight in _recurrent_weights(layer):
                init.orthogonal_(weight)
            if describe.kind_of(layer).startswith("rnn"):  # gates have biases of their own choice
                _zero_recurrent_biases(layer)
        return _nothing
    kinds = following_kinds(root, passage)
    for layer in weighted:
        _DRAWS[method](layer, kinds.get(layer, "identity"))
    return _UnitVariance(passage, weighted).end if method == "lsuv" else _nothing


def _nothing() -> None:
    """Nothing waits."""


def _has_weight(layer: nn.Module) -> bool:
    weight = getattr(layer, "weight", None)
    return isinstance(weight, Tensor) and not torch.nn.parameter.is_lazy(weight)


def following_kinds(root: nn.Module, passage: Passage) -> dict[nn.Module, str]:
    """The kind of the activation behind each layer with weights; "identity" behind the output layer.

    It is the next module before the following layer with weights, or else the activation that the model's own code
    calls most.
    """
    order = [module for _, module in describe.walk(root)]
    called = Counter(passages.kinds_called_by(order))
    loose = [m for parent in order if not isinstance(parent, nn.Sequential) for m in parent.children()]
    called.update(kind for m in loose if (kind := describe.kind_of(m)) in describe.ACTIVATIONS)
    usual = next((kind for kind, _ in called.most_common() if kind in describe.ACTIVATIONS), "identity")
    usual = passage.renamed.get(usual, usual)
    found: dict[nn.Module, str] = {}
    waiting: list[nn.Module] = []
    for module in order:
        kind = describe.kind_of(module)
        if kind in _WEIGHTED:
            waiting = [module]
            found[module] = usual
        elif kind in describe.ACTIVATIONS and module not in loose:
            found.update(dict.fromkeys(waiting, kind))
            waiting = []
    if passage.output_layer is not None:
        found[passage.output_layer] = "identity"
    return found


# ---- layers with weights ------------------------------------------------------------------------------------------


def _zero_bias(layer: Any) -> None:
    if getattr(layer, "bias", None) is not None:
        init.zeros_(layer.bias)


def _xavier(layer: Any, kind: str) -> None:
    init.xavier_uniform_(layer.weight)
    _zero_bias(layer)


def _kaiming(layer: Any, kind: str) -> None:
    """He et al. 2015: gain sqrt(2) in front of rectifiers, 1 elsewhere."""
    init.kaiming_normal_(layer.weight, nonlinearity="relu" if kind in _RECTIFIERS else "linear")
    _zero_bias(layer)


def _orthogonal(layer: Any, kind: str) -> None:
    """Saxe et al. 2014, with the same gains."""
    init.orthogonal_(layer.weight, gain=math.sqrt(2) if kind in _RECTIFIERS else 1.0)
    _zero_bias(layer)


def _critical(layer: Any, kind: str) -> None:
    """Weights of variance C_W / fan_in and biases of variance C_b, at the activation's critical point."""
    weights, biases = critical_variances(kind)
    fan_in, _ = describe.fans(layer)
    init.normal_(layer.weight, std=math.sqrt(weights / max(1, fan_in)))
    if getattr(layer, "bias", None) is not None:
        init.normal_(layer.bias, std=math.sqrt(biases))


_DRAWS: dict[str, Callable[[Any, str], None]] = {
    "xavier": _xavier, "kaiming": _kaiming, "orthogonal": _orthogonal, "critical": _critical,
    "lsuv": lambda layer, kind: _orthogonal(layer, "identity"),
}  # fmt: skip


class _UnitVariance:
    """LSUV (Mishkin & Matas 2016, arXiv:1511.06422): in the first forward pass each layer's weights are divided by the
    standard deviation of what it returns until that is within 0.1 of 1, at most 10 times; layers behind it see that.

    It happens inside the program's own first pass, so it costs no other, and draws no random number.
    """

    def __init__(self, passage: Passage, layers: Sequence[nn.Module]) -> None:
        self._passage, self._layers = passage, list(layers)
        self._scaled: set[int] = set()
        for layer in layers:
            # Not a hook: others are to read only what the layer returns in the end.
            layer.__dict__["forward"] = _Forward(self, layer, vars(layer).get("forward"))
        passage.afterwards.append(self._finish)

    def call(self, layer: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The layer's forward pass, with its weights scaled in the first one."""
        output = forward(*args, **kwargs)
        is_over = not self._layers or id(layer.weight) in self._scaled
        if is_over or not layer.training or not torch.is_grad_enabled():
            return output
        self._scaled.add(id(layer.weight))
        for _ in range(10):
            spread = float(output.detach().float().std())
            if not math.isfinite(spread) or spread == 0 or abs(spread - 1) < 0.1:
                break
            with torch.no_grad():
                layer.weight.div_(spread)
            output = forward(*args, **kwargs)
        return output

    def _finish(self) -> None:
        if self._scaled:
            self.end()

    def end(self) -> None:
        """Wait no longer."""
        while self._layers:
            layer = self._layers.pop()
            waiting = vars(layer).get("forward")
            if isinstance(waiting, _Forward):
                waiting.leave(layer)
        self._passage.afterwards[:] = [one for one in self._passage.afterwards if one != self._finish]


class _Forward:
    """What a layer is called with while it waits for its first batch; a copy waits as well, a pickle does not.

    `own`: a forward pass that the program has given to this one layer, in the place of its class's.
    """

    def __init__(self, scaling: _UnitVariance, layer: nn.Module, own: Callable[..., Any] | None) -> None:
        self._scaling, self._layer, self._own = scaling, layer, own

    @property
    def _forward(self) -> Callable[..., Any]:
        return self._own or partial(type(self._layer).forward, self._layer)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._scaling.call(self._layer, self._forward, *args, **kwargs)

    def leave(self, layer: nn.Module) -> None:
        """Let the layer have what it had."""
        if self._own is None:
            del layer.__dict__["forward"]
        else:
            layer.__dict__["forward"] = self._own

    def __deepcopy__(self, memo: dict[int, Any]) -> _Forward:
        return _Forward(self._scaling, copy.deepcopy(self._layer, memo), copy.deepcopy(self._own, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return partial, (self._forward,)


def _draw_fixup(root: nn.Module, passage: Passage, chosen: Sequence[nn.Module]) -> None:
    """Fixup (Zhang et al. 2019, arXiv:1901.09321) without its scalar parameters: in each of L residual branches of m
    layers the last starts at zero and the others at He's scale times L^(-1 / (2 m - 2)); the classifier at zero.

    A branch is a module of the program's own with two weighted layers or more, of a class that occurs more than once.
    Only branches of `chosen` layers are drawn.
    """
    blocks = [layers for layers in residual_blocks(root) if all(layer in chosen for layer in layers)]
    if not blocks:
        raise CannotApply("No repeated residual blocks were found: Fixup is for residual networks.")
    for layers in blocks:
        for layer in layers:
            _kaiming(layer, "relu")
            layer.weight.mul_(len(blocks) ** (-1 / (2 * len(layers) - 2)))
        init.zeros_(layers[-1].weight)
    if passage.output_layer in chosen:
        init.zeros_(passage.output_layer.weight)  # type: ignore[union-attr, arg-type]
        _zero_bias(passage.output_layer)


def residual_blocks(root: nn.Module) -> list[list[Any]]:
    """The weighted layers of each innermost repeated block; those of a nested projection shortcut are left out."""
    times = Counter(type(module) for module in root.modules())
    own = [m for m in root.modules() if times[type(m)] > 1 and not type(m).__module__.startswith("torch.nn")]
    found = []
    for block in own:
        direct = [child for child in block.children() if describe.kind_of(child) in _WEIGHTED]
        nested = [child for child in block.modules() if describe.kind_of(child) in _WEIGHTED]
        layers = direct if len(direct) > 1 else nested
        is_innermost = not any(inner in own for inner in block.modules() if inner is not block)
        if len(layers) > 1 and is_innermost:
            found.append(layers)
    return found


# ---- recurrent layers -----------------------------------------------------------------------------------------------


def _recurrent_weights(layer: nn.Module) -> list[Tensor]:
    """The recurrent matrix of each gate; [hidden, projected] where a projection of the state comes back."""
    matrices = [p for name, p in layer.named_parameters(recurse=False) if name.startswith("weight_hh")]
    return [gate for matrix in matrices for gate in torch.split(matrix, layer.hidden_size)]  # type: ignore[arg-type]


def _draw_recurrent(layers: Sequence[nn.Module], method: str) -> Callable[[], None]:
    suits = {"forget-bias": "lstm", "chrono": "", "identity-recurrence": "rnn"}[method]
    chosen = [layer for layer in layers if describe.kind_of(layer).startswith(suits)]
    if method == "chrono":
        chosen = [layer for layer in chosen if describe.kind_of(layer) in ("lstm", "gru")]
    if not chosen:
        raise CannotApply(f"No recurrent layer of this model has what {method} sets.")
    if method == "chrono":
        return _Chrono(chosen).end
    for layer in chosen:
        _set_forget_bias(layer) if method == "forget-bias" else _set_identity(layer)
    return _nothing


def _set_forget_bias(layer: nn.Module) -> None:
    """Gers et al. 2000: the two forget biases of torch's LSTM add up to 1."""
    for name, bias in layer.named_parameters(recurse=False):
        if name.startswith("bias"):
            _, forget, _, _ = bias.chunk(4)
            forget.fill_(1.0 if name.startswith("bias_ih") else 0.0)


def _set_identity(layer: nn.Module) -> None:
    """Le et al. 2015, arXiv:1504.00941: the identity and no bias. What enters keeps its weights."""
    for weight in _recurrent_weights(layer):
        weight.copy_(torch.eye(weight.shape[0]))
    _zero_recurrent_biases(layer)


def _zero_recurrent_biases(layer: nn.Module) -> None:
    for name, bias in layer.named_parameters(recurse=False):
        if name.startswith("bias"):
            bias.zero_()


class _Chrono:
    """Chrono initialization (Tallec & Ollivier 2018, arXiv:1804.11188): b_forget = log U[1, T - 1] = -b_input,
    where T is the length of the first batch's sequences; for a GRU, the update gate's bias is log U[1, T - 1].
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._handles = {layer: layer.register_forward_pre_hook(passages.hook(self._draw)) for layer in layers}

    def _draw(self, layer: Any, args: tuple[Any, ...]) -> None:
        self._handles.pop(layer).remove()
        with torch.no_grad(), own_randomness():
            for name, bias in layer.named_parameters(recurse=False):
                if name.startswith("bias"):
                    gates = bias.split(layer.hidden_size)
                    _set_chrono(gates, _length(layer, args[0]), first=name.startswith("bias_ih"))

    def end(self) -> None:
        """Wait no longer."""
        while self._handles:
            self._handles.popitem()[1].remove()


def _length(layer: Any, sequences: Any) -> int:
    if isinstance(sequences, nn.utils.rnn.PackedSequence):
        return len(sequences.batch_sizes)
    return int(sequences.shape[1 if layer.batch_first and sequences.dim() == 3 else 0])


def _set_chrono(gates: Sequence[Tensor], length: int, *, first: bool) -> None:
    """Of torch's two biases the first holds the sum. Gates: input, forget, … of an LSTM, reset, update, … of a GRU."""
    longest = max(2.0, length - 1.0)
    memory = torch.empty_like(gates[1]).uniform_(1.0, longest).log_() if first else torch.zeros_like(gates[1])
    gates[1].copy_(memory)
    if len(gates) == 4:
        gates[0].copy_(-memory)
