"""`normalize-queries-and-keys`: a remedy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from isograd._changes import Change
from isograd._history import History
from isograd._remedy import Applicability, Remedy


@dataclass(frozen=True, kw_only=True)
class NormalizeQueriesAndKeys(Remedy):
    """Normalize queries and keys before their product (QK-norm).

    What it does
        LayerNorm or RMSNorm over each head of q and k: logits are bounded by the learned gains.

    When it helps
        Attention logits that grow with the rate until each query sees one key.

    Risks
        A network trained without it has to be retrained or fine-tuned.

    Prediction
        `attention_logit_max` stays bounded; `attention_entropy` stays above 0.

    Sources
        Henry et al. 2020, arXiv:2010.04245; Dehghani et al. 2023, arXiv:2302.05442; Wortsman et al. 2023,
        arXiv:2309.14322.
    """

    treats: ClassVar[tuple[str, ...]] = ("attention-saturation",)
    applicability: ClassVar[Applicability] = "advice"
    predicts: ClassVar[tuple[str, Literal["up", "down", "finite"]]] = ("attention_logit_max", "down")

    def changes(self, history: History) -> tuple[Change, ...]:
        del history
        return ()

    def code(self, history: History) -> str:
        del history
        return (
            "self.query_norm = torch.nn.RMSNorm(head_dim)  # in __init__, as self.key_norm\n"
            "query, key = self.query_norm(query), self.key_norm(key)\n"
            "attend = torch.nn.functional.scaled_dot_product_attention\n"
            "attended = attend(query, key, value)"
        )

    def keras_code(self, history: History) -> str:
        del history
        return (
            "query = keras.layers.RMSNormalization()(query)\n"
            "key = keras.layers.RMSNormalization()(key)\n"
            "scores = keras.ops.matmul(query, keras.ops.swapaxes(key, -1, -2))"
        )
