"""initialization-too-large."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from isograd._gain import Gain, initial_gain
from isograd._history import History
from isograd._loss_curve import LossCurve, loss_curve
from isograd._rule import Evidence, Finding, Level, Rule, Stage


@dataclass(frozen=True, kw_only=True)
class InitializationTooLarge(Rule):
    """The weights start so large that the signal grows from layer to layer.

    Detects
        At the first deep reading, in a chain of linear and convolutional layers without normalization: outputs gain
        `decades` or more towards the loss, or the gradient signal does towards the input, and the typical weight
        scale is above `ratio` of the critical one, sqrt(1 / (fan_in E[phi'^2])).

    Why it matters
        Outputs and gradients of size c^L: losses in the thousands, saturated activations, and steps that leave every
        region in which the gradient meant anything.

    Decided by
        decades: 2, a hundredfold growth over the network. ratio: 1.25 of the critical scale, tenfold in ten layers.

    Stays silent when
        Normalizations carry the signal. Info unless the loss ends badly: many a network survives its start.

    Remedies
        reinitialize-layers, insert-normalization, clip-gradient-norm

    References
        He et al. 2015, Delving deep into rectifiers, arXiv:1502.01852; Poole et al. 2016, Exponential expressivity in
        deep neural networks through transient chaos, arXiv:1606.05340; Zhang, Dauphin & Ma 2019, Fixup
        initialization, arXiv:1901.09321.
    """

    stage: ClassVar[Stage] = "initialization"
    needs: ClassVar[tuple[str, ...]] = ("weight_norm", "output_rms")
    uses: ClassVar[tuple[str, ...]] = ("signal_norm", "loss", "loss_nonfinite")
    explains: ClassVar[tuple[str, ...]] = (
        "exploding-gradients",
        "loss-divergence",
        "loss-spike",
        "loss-oscillation",
        "loss-plateau",
        "nonfinite-values",
        "dead-units",
        "saturating-activations",
        "saturated-output",
        "learning-rate-too-high",
    )
    remedies: ClassVar[tuple[str, ...]] = ("reinitialize-layers", "insert-normalization", "clip-gradient-norm")

    decades: float = 2.0
    ratio: float = 1.25

    def check(self, history: History) -> Iterator[Finding]:
        gain = initial_gain(history)
        if gain is None or not (gain.ratio >= self.ratio and gain.predicted >= self.decades / 2):
            return
        grown, where = self._grown(gain)
        if not grown >= self.decades:
            return
        names = tuple(history.layers[index].name for index in gain.columns)
        yield self.finding(
            history,
            level=self._level(loss_curve(history)),
            message=f"The weights start at {gain.ratio:.3g} times the critical scale (limit "
            f"{self.ratio:g}), and {where} "
            f"{grown:.1f} decades over {len(names)} layers (limit {self.decades:g}).",
            first_step=gain.step,
            layers=names,
            evidence=(
                Evidence(statistic="weight_scale", observed=gain.ratio, limit=self.ratio, step=gain.step),
                Evidence(statistic="decades_gained", observed=grown, limit=self.decades, step=gain.step),
            ),
            confidence=0.85,
        )

    def _grown(self, gain: Gain) -> tuple[float, str]:
        backward = gain.backward if gain.backward == gain.backward else float("-inf")
        if gain.forward >= backward:
            return gain.forward, "outputs gain"
        return backward, "the gradient signal gains"

    def _level(self, curve: LossCurve | None) -> Level:
        if curve is None:
            return "warning"
        return "error" if curve.failed else "info"
