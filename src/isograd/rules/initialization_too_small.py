"""initialization-too-small."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from isograd._gain import initial_gain
from isograd._history import History
from isograd._loss_curve import loss_curve
from isograd._rule import Evidence, Finding, Level, Rule, Stage


@dataclass(frozen=True, kw_only=True)
class InitializationTooSmall(Rule):
    """The weights start so small that the signal shrinks from layer to layer.

    Detects
        At the first deep reading, in a chain of linear and convolutional layers without normalization: the gradient
        signal loses `decades` or more from the loss to the input, the typical weight scale is below `ratio` of the
        critical one, sqrt(1 / (fan_in E[phi'^2])), and the weights' scale accounts for at least half of what is lost.

    Why it matters
        Each layer multiplies the gradient norm by sqrt(sigma_w^2 E[phi'^2]). PyTorch's default for linear and
        convolutional layers is sigma_w^2 = 1/3, where ReLU needs 2: a factor of 0.41 per layer, four decades in ten
        layers.

    Decided by
        decades: 3 over the whole network. ratio: 0.8 of the critical scale, 2 % of the signal left after 20 layers.
        hopeless: 7 decades, the resolution of float32.

    Stays silent when
        Shortcuts or normalizations carry the signal, or the activation has no critical scale of order one (sigmoid,
        softplus: see saturating-activations). Info while the loss falls.

    Remedies
        reinitialize-layers, insert-normalization, insert-shortcuts

    References
        He et al. 2015, Delving deep into rectifiers, arXiv:1502.01852; Glorot & Bengio 2010; Schoenholz et al. 2017,
        Deep information propagation, arXiv:1611.01232; Roberts, Yaida & Hanin 2022, The principles of deep learning
        theory.
    """

    stage: ClassVar[Stage] = "initialization"
    needs: ClassVar[tuple[str, ...]] = ("weight_norm", "output_rms", "signal_norm")
    uses: ClassVar[tuple[str, ...]] = ("loss", "loss_nonfinite")
    explains: ClassVar[tuple[str, ...]] = ("vanishing-gradients", "loss-plateau", "no-gradient", "dead-units")
    remedies: ClassVar[tuple[str, ...]] = ("reinitialize-layers", "insert-normalization", "insert-shortcuts")

    decades: float = 3.0
    ratio: float = 0.8
    hopeless: float = 7.0

    def check(self, history: History) -> Iterator[Finding]:
        gain = initial_gain(history)
        if gain is None or not (gain.ratio <= self.ratio and -gain.backward >= self.decades):
            return
        if -gain.predicted < -gain.backward / 2:
            return
        names = tuple(history.layers[index].name for index in gain.columns)
        yield self.finding(
            history,
            level=self._level(history, -gain.backward),
            message=f"The weights start at {gain.ratio:.2f} of the critical scale (limit {self.ratio:g}), and over "
            f"{len(names)} layers the gradient signal loses {-gain.backward:.1f} decades (limit {self.decades:g}).",
            first_step=gain.step,
            layers=names,
            evidence=(
                Evidence(statistic="weight_scale", observed=gain.ratio, limit=self.ratio, step=gain.step, below=True),
                Evidence(statistic="decades_lost", observed=-gain.backward, limit=self.decades, step=gain.step),
            ),
            confidence=0.85,
        )

    def _level(self, history: History, lost: float) -> Level:
        curve = loss_curve(history)
        if curve is not None and curve.failed:
            return "error"
        return "warning" if lost >= self.hopeless else "info"
