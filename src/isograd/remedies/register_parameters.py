"""`register-parameters`: a remedy."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from isograd import _changes
from isograd._changes import Change
from isograd._history import History
from isograd._loss_graph import loss_graphs
from isograd._program import first_learning_rate, is_seen, optimizer_name
from isograd._remedy import Remedy


@dataclass(frozen=True, kw_only=True)
class RegisterParameters(Remedy):
    """Let the model and the optimizer hold all parameters.

    What it does
        Layers in plain lists and dicts become the model's, as in ModuleList and ModuleDict, and the optimizer trains
        every trainable parameter that none holds: as if it had been built after the last change of the model.

    When it helps
        Layers in a plain list or dict; layers replaced after the optimizer was built.

    Risks
        What was left out on purpose, without requires_grad_(False), is trained. Saved optimizer states do not fit the
        new parameter list.

    Prediction
        Every parameter has an `update_norm`.

    Sources
        torch.nn.ModuleList and torch.optim documentation (construct optimizers after moving or replacing).
    """

    treats: ClassVar[tuple[str, ...]] = ("parameters-not-optimized",)
    predicts: ClassVar[tuple[str, Literal["up", "down", "finite"]]] = ("update_norm", "up")

    def changes(self, history: History) -> tuple[Change, ...]:
        del history
        return (_changes.RegisterParameters(),)

    def code(self, history: History) -> str:
        found = dict(_containers(history)) if is_seen(history) else {"layers": "ModuleList"}
        rate = first_learning_rate(history)
        return "\n".join(
            [
                *(f"self.{name} = torch.nn.{kind}(self.{name})  # in __init__" for name, kind in found.items()),
                "# after the model is complete:",
                f"optimizer = torch.optim.{optimizer_name(history) or 'SGD'}(",
                f"    {history.subject}.parameters(), lr={'lr' if rate is None else f'{rate:g}'}",
                ")",
            ]
        )

    def keras_code(self, history: History) -> str:
        del history
        return (
            "# Keras trains what layers make, in attributes, lists and dicts:\n"
            "class Scale(keras.Layer):\n"
            "    def build(self, input_shape):\n"
            '        self.scale = self.add_weight(shape=(), initializer="ones")\n'
            "\n"
            "    def call(self, x):\n"
            "        return self.scale * x"
        )


def _containers(history: History) -> Iterator[tuple[str, str]]:
    """(attribute, what torch has for it) of the lists and dicts in which parameters were found: `Net.blocks[1].bias` is
    of the list `blocks` of modules, `Net.scales['a']` of the dict `scales` of parameters.
    """
    for graph in loss_graphs(history):
        for name in graph.unregistered:
            place = re.match(r"[^.]+\.(\w+)\[(.)[^\]]*\](\.?)", name)
            if place is not None:
                attribute, quote, dot = place.groups()
                yield attribute, ("Module" if dot else "Parameter") + ("Dict" if quote in "'\"" else "List")
