"""The training programs that are timed: a GPT, a ResNet-18, an LSTM language model, and N loose tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu, scaled_dot_product_attention

VOCABULARY = 4096


def nothing() -> None:
    """What an unwatched program calls before and after an optimizer step."""


@dataclass(frozen=True, kw_only=True)
class Calls:
    """What a variant adds to the loop itself, where its users write it: between backward and step, and after it."""

    before_update: Callable[[], None] = nothing
    after_step: Callable[[], None] = nothing


@dataclass(frozen=True, kw_only=True)
class Program:
    """A model, its optimizer and the loss of one batch; the batches repeat.

    `batch` is the first one, as (input, target), and `loss_fn` what compares the output with the target.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[int], Tensor]
    batch: tuple[Tensor, Tensor] | None = None
    loss_fn: Callable[[Tensor, Tensor], Tensor] | None = None

    def step(self, index: int, calls: Calls) -> None:
        """One optimizer step, as a plain loop has it."""
        loss = self.loss(index)
        self.optimizer.zero_grad()
        loss.backward()
        calls.before_update()
        self.optimizer.step()
        calls.after_step()


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, time, width] to the same shape."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """13.8 million parameters at the default width."""

    def __init__(self, width: int, depth: int, heads: int, context: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [batch, time] to logits [batch, time, vocabulary]."""
        return self.head(self.norm(self.blocks(self.tokens(x) + self.positions.weight[: x.shape[1]])))


def gpt(width: int = 384, batch: int = 8, context: int = 128) -> Program:
    """The GPT with fused AdamW, on 8 x 128 random tokens a step."""
    torch.manual_seed(0)
    model = GPT(width, depth=6, heads=6, context=context)
    tokens = torch.randint(VOCABULARY, (8, batch, context + 1))
    return _language_program(model, torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True), tokens)


def _language_program(model: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor) -> Program:
    return Program(
        model=model,
        optimizer=optimizer,
        loss=lambda index: _next_token_loss(model(tokens[index % 8, :, :-1]), tokens[index % 8, :, 1:]),
        batch=(tokens[0, :, :-1], tokens[0, :, 1:]),
        loss_fn=_next_token_loss,
    )


def _next_token_loss(scores: Tensor, following: Tensor) -> Tensor:
    return cross_entropy(scores.flatten(0, 1), following.flatten())


class Residual(nn.Module):
    """The basic block of He et al. (2016)."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outer), nn.BatchNorm2d(outer)
        same = inner == outer and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inner, outer, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, inner, h, w] to [batch, outer, h / stride, w / stride]."""
        return relu(self.norm2(self.conv2(relu(self.norm1(self.conv1(x))))) + self.shortcut(x))


def cnn() -> Program:
    """ResNet-18 for 32 x 32 images (11.2 million parameters), SGD with momentum, 16 images a step."""
    torch.manual_seed(0)
    widths = [64, 64, 64, 128, 128, 256, 256, 512, 512]
    blocks = [Residual(inner, outer, 1 if inner == outer else 2) for inner, outer in pairwise(widths)]
    stem = [nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    model = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))
    images, labels = torch.randn(8, 16, 3, 32, 32), torch.randint(10, (8, 16))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    return Program(
        model=model,
        optimizer=optimizer,
        loss=lambda index: cross_entropy(model(images[index % 8]), labels[index % 8]),
        batch=(images[0], labels[0]),
        loss_fn=cross_entropy,
    )


class LanguageModel(nn.Module):
    """Two LSTM layers between an embedding and a projection to the vocabulary."""

    def __init__(self, embedding: int, hidden: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, embedding)
        self.lstm = nn.LSTM(embedding, hidden, num_layers=2, batch_first=True)
        self.head = nn.Linear(hidden, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [batch, time] to logits [batch, time, vocabulary]."""
        return self.head(self.lstm(self.tokens(x))[0])


def lstm() -> Program:
    """A language model of 6.8 million parameters with Adam, on 16 x 64 random tokens a step."""
    torch.manual_seed(0)
    model = LanguageModel(embedding=256, hidden=512)
    tokens = torch.randint(VOCABULARY, (8, 16, 65))
    return _language_program(model, torch.optim.Adam(model.parameters(), lr=1e-3), tokens)


class LooseTensors(nn.Module):
    """N parameters of 64 entries that meet in one sum of squares: all cost is per tensor."""

    def __init__(self, num: int) -> None:
        super().__init__()
        self.tensors = nn.ParameterList(torch.randn(64) for _ in range(num))

    def forward(self) -> Tensor:
        """Half the sum of squares of all entries."""
        return torch.cat(list(self.tensors)).square().sum() / 2


def loose_tensors(num: int) -> Program:
    """`num` tensors of 64 entries and SGD."""
    torch.manual_seed(0)
    model = LooseTensors(num)
    return Program(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1e-3), loss=lambda _index: model())
