"""What can be measured: the first of the two vocabularies that cross the boundary to the frameworks.

This module defines names, axes and meanings. It computes nothing: the kernels are in `frameworks/`,
and every one of them is compared with a float64 one-liner in `tests/`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Axis = Literal["step", "group", "parameter", "layer", "call"]
Tier = Literal["cheap", "deep"]


@dataclass(frozen=True, kw_only=True)
class Statistic:
    """One measurable quantity.

    `axis` says what one row holds: a single number (`step`), one number per parameter group (`group`),
    per parameter tensor (`parameter`), per layer (`layer`), or a profile over the calls of one layer (`call`).
    `tier` says when it is read: at every optimizer step (`cheap`) or on the deep schedule (`deep`).
    `error` states how exact it is. A reading that does not exist is NaN; non-finite entries are never
    represented by NaN but counted by the `*_nonfinite` statistic of the same axis.
    """

    name: str
    axis: Axis
    tier: Tier
    unit: str
    meaning: str
    error: str = "exact"


_CATALOG = (
    # ---- cheap tier, one number per step -----------------------------------------------------------------
    Statistic(
        name="loss",
        axis="step",
        tier="cheap",
        unit="loss",
        meaning="The tensor that `backward` was called on, averaged over the backward passes of the step and, "
        "under data parallelism, over ranks. Passes through `torch.autograd.grad` count in steps without another. Of "
        "a step with a closure, what was evaluated at its first weights. NaN when it is not finite: see "
        "`loss_nonfinite`.",
    ),
    Statistic(
        name="loss_nonfinite",
        axis="step",
        tier="cheap",
        unit="count",
        meaning="How many of the step's loss values were NaN or Inf.",
    ),
    Statistic(
        name="global_grad_norm",
        axis="step",
        tier="cheap",
        unit="loss / weight",
        meaning="L2 norm of all gradients together as the optimizer receives them: sqrt(sum of squares), after "
        "unscaling, accumulation and the user's clipping.",
    ),
    Statistic(
        name="global_grad_norm_unclipped",
        axis="step",
        tier="cheap",
        unit="loss / weight",
        meaning="The same before the user's `clip_grad_norm_`; `global_grad_norm` where nothing clips by norm.",
    ),
    Statistic(
        name="clip_factor",
        axis="step",
        tier="cheap",
        unit="ratio",
        meaning="The factor that the user's `clip_grad_norm_` multiplied the gradients with; 1 when it did not clip.",
    ),
    Statistic(
        name="micro_batches",
        axis="step",
        tier="cheap",
        unit="count",
        meaning="Backward passes since the previous optimizer step: those that `loss` averages.",
    ),
    Statistic(
        name="loss_scale",
        axis="step",
        tier="cheap",
        unit="ratio",
        meaning="The scale of `torch.amp.GradScaler`; 1 without one.",
    ),
    Statistic(
        name="skipped",
        axis="step",
        tier="cheap",
        unit="count",
        meaning="1 when the step left the weights alone because a GradScaler found a non-finite gradient.",
    ),
    Statistic(
        name="step_seconds",
        axis="step",
        tier="cheap",
        unit="s",
        meaning="Wall time since the previous step ended, the watcher's own time included.",
    ),
    Statistic(
        name="watch_seconds",
        axis="step",
        tier="cheap",
        unit="s",
        meaning="The watcher's own share of `step_seconds`, timed inside every hook.",
    ),
    Statistic(
        name="carried_grad_norm",
        axis="step",
        tier="deep",
        unit="loss / weight",
        meaning="L2 norm of the gradients that the step's parameters held already when its first backward pass began: "
        "what earlier steps left behind. 0 where gradients are cleared between steps.",
    ),
    Statistic(
        name="graph_nodes",
        axis="step",
        tier="deep",
        unit="count",
        meaning="Nodes of the autograd graph below the loss. Growing from step to step, it carries its past.",
        error="counted up to 20000",
    ),
    # ---- cheap tier, per parameter group and per parameter ------------------------------------------------
    Statistic(
        name="learning_rate",
        axis="group",
        tier="cheap",
        unit="1",
        meaning="The learning rate that this step used, of each parameter group.",
    ),
    Statistic(
        name="grad_norm",
        axis="parameter",
        tier="cheap",
        unit="loss / weight",
        meaning="L2 norm of the gradient as the optimizer receives it, accumulated in float32 or wider. Inf when the "
        "sum of squares overflows although every entry is finite. NaN without a gradient or with a bad entry.",
    ),
    Statistic(
        name="grad_max",
        axis="parameter",
        tier="cheap",
        unit="loss / weight",
        meaning="Largest absolute gradient entry. Exactly 0 means an exactly zero gradient, also where the L2 norm "
        "underflows (entries below 1e-23 in float32).",
        error="on CPU, beyond 16384 entries: the largest of 64 evenly spaced runs of 256, a lower bound; exact where "
        "the norm is 0 or not finite, and on accelerators",
    ),
    Statistic(
        name="grad_nonfinite",
        axis="parameter",
        tier="cheap",
        unit="count",
        meaning="Entries of the gradient that are NaN or Inf. NaN when there is no gradient.",
        error="exact on CPU and at deep steps; between them on an accelerator 1 stands for one or more",
    ),
    # ---- deep tier, per parameter ---------------------------------------------------------------------------
    Statistic(
        name="grad_zero_fraction",
        axis="parameter",
        tier="deep",
        unit="fraction",
        meaning="Share of gradient entries that are exactly zero.",
        error="64 evenly spaced runs of 256 entries: standard error <= 0.004 where neighbors are independent, "
        "<= 0.06 where runs are all alike",
    ),
    Statistic(
        name="weight_norm",
        axis="parameter",
        tier="deep",
        unit="weight",
        meaning="L2 norm of the parameter before the step. NaN when an entry is not finite.",
    ),
    Statistic(
        name="weight_nonfinite",
        axis="parameter",
        tier="deep",
        unit="count",
        meaning="Entries of the parameter that are NaN or Inf before the step.",
    ),
    Statistic(
        name="state_nonfinite",
        axis="parameter",
        tier="deep",
        unit="count",
        meaning="Entries of the optimizer's state tensors for the parameter that are NaN or Inf after the step; read "
        "when the gradient or the parameter is not finite, otherwise 0.",
    ),
    Statistic(
        name="update_norm",
        axis="parameter",
        tier="deep",
        unit="weight",
        meaning="L2 norm of the change that the step made to the parameter.",
        error="64 evenly spaced runs of 256 entries, scaled by sqrt(numel / sampled): relative standard error "
        "about sqrt(kurtosis / 4 / 16384), 1 % for Gaussian updates; exact for smaller tensors",
    ),
    Statistic(
        name="update_ratio",
        axis="parameter",
        tier="deep",
        unit="ratio",
        meaning="update_norm over the L2 norm of the same sampled entries of the parameter before the step. About 1e-3 "
        "is usual (Karpathy, makemore part 3, 2022).",
        error="as update_norm",
    ),
    Statistic(
        name="unit_spread",
        axis="parameter",
        tier="deep",
        unit="ratio",
        meaning="Weights with two axes or more: root mean square of what is left after subtracting the mean over the "
        "output units (first axis), over the root mean square of the weight. 0 where all units are identical, about 1 "
        "for independent ones. NaN with a single unit, or where every entry is zero.",
        error="at most 64 evenly spaced units and the first 256 connections of each",
    ),
    Statistic(
        name="replica_difference",
        axis="parameter",
        tier="deep",
        unit="ratio",
        meaning="Data parallelism: largest difference of the parameter's L2 norm between two ranks, over the largest. "
        "0 where replicas are equal, 1 where only some are finite; NaN in a single process.",
    ),
    # ---- deep tier, per layer -------------------------------------------------------------------------------
    Statistic(
        name="output_rms",
        axis="layer",
        tier="deep",
        unit="activation",
        meaning="Root mean square of the layer's output over all calls of the step; NaN when an entry is not finite.",
    ),
    Statistic(
        name="output_mean",
        axis="layer",
        tier="deep",
        unit="activation",
        meaning="Mean of the layer's output over all calls of the step.",
        error="modules and operations: 64 evenly spaced runs of 256 entries a call, standard error std / 128; "
        "exact for inputs, predictions and targets up to 262144 entries",
    ),
    Statistic(
        name="output_min",
        axis="layer",
        tier="deep",
        unit="activation",
        meaning="Smallest output entry. For inputs and targets: the smallest value fed.",
        error="as output_mean: the smallest of the sample where it is sampled",
    ),
    Statistic(
        name="output_max",
        axis="layer",
        tier="deep",
        unit="activation",
        meaning="Largest output entry. For inputs and targets: the largest value fed.",
        error="as output_mean: the largest of the sample where it is sampled",
    ),
    Statistic(
        name="output_zero_fraction",
        axis="layer",
        tier="deep",
        unit="fraction",
        meaning="Share of output entries that are exactly zero.",
        error="64 evenly spaced runs of 256 entries a call: standard error <= 0.004 where neighbors are independent, "
        "<= 0.06 where runs are all alike",
    ),
    Statistic(
        name="output_nonfinite",
        axis="layer",
        tier="deep",
        unit="count",
        meaning="Output entries that are NaN or Inf. The first layer with a count above 0 whose `input_nonfinite` is 0 "
        "is where the forward pass broke.",
    ),
    Statistic(
        name="input_nonfinite",
        axis="layer",
        tier="deep",
        unit="count",
        meaning="Entries of the layer's floating-point inputs that are NaN or Inf; read where the output has any.",
    ),
    Statistic(
        name="output_size",
        axis="layer",
        tier="deep",
        unit="count",
        meaning="Output entries of the step, all calls together.",
    ),
    Statistic(
        name="calls",
        axis="layer",
        tier="deep",
        unit="count",
        meaning="How often the layer was called in the step (weight sharing, time steps, micro-batches).",
    ),
    Statistic(
        name="dead_fraction",
        axis="layer",
        tier="deep",
        unit="fraction",
        meaning="Activation layers: share of units (features or channels) whose slope is zero for every input of the "
        "step. A unit is one index of the feature axis.",
        error="all inputs up to 262144 entries a call, beyond that strided rows: a unit active on a share p of the "
        "rows is missed with probability (1 - p)^rows; of several calls the smallest share, an upper bound",
    ),
    Statistic(
        name="saturation",
        axis="layer",
        tier="deep",
        unit="fraction",
        meaning="Bounded activations (sigmoid, tanh, hardtanh, softsign): share of entries whose slope is below 5 % of "
        "the activation's largest slope (sigmoid outside [.0127, .9873], |tanh| > .975).",
        error="64 evenly spaced runs of 256 entries a call: standard error <= 0.004 where neighbors are independent, "
        "<= 0.06 where runs are all alike",
    ),
    Statistic(
        name="activation_slope",
        axis="layer",
        tier="deep",
        unit="ratio",
        meaning="Activation layers: sqrt(mean of the squared derivative), the activation's share of the per-layer "
        "gradient factor sqrt(sigma_w^2 E[phi'^2]) of mean-field theory (Schoenholz et al. 2017).",
        error="64 evenly spaced runs of 256 entries a call",
    ),
    Statistic(
        name="signal_norm",
        axis="layer",
        tier="deep",
        unit="loss / activation",
        meaning="L2 norm of the gradient of the loss with respect to the layer's output, all calls together: the "
        "gradient signal. Inf when the sum of squares overflows; NaN when an entry is not finite, or none arrived.",
    ),
    Statistic(
        name="signal_max",
        axis="layer",
        tier="deep",
        unit="loss / activation",
        meaning="Largest absolute entry of the gradient with respect to the layer's output.",
        error="64 evenly spaced runs of 256 entries a call: a lower bound; exact where signal_norm is 0 or overflows",
    ),
    Statistic(
        name="signal_nonfinite",
        axis="layer",
        tier="deep",
        unit="count",
        meaning="Entries of the gradient with respect to the layer's output that are NaN or Inf.",
    ),
    Statistic(
        name="signal_zero_fraction",
        axis="layer",
        tier="deep",
        unit="fraction",
        meaning="Share of the entries of the gradient with respect to the layer's output that are exactly zero.",
        error="64 evenly spaced runs of 256 entries a call",
    ),
    Statistic(
        name="row_similarity",
        axis="layer",
        tier="deep",
        unit="ratio",
        meaning="Layers with two axes or more: mean cosine similarity between two different rows (samples, nodes or "
        "tokens; a row is one index of all axes but the feature axis). 1 where all rows point the same way.",
        error="at most 64 evenly spaced rows and the first 256 features, of the last call (of a module called over "
        "16 times, of the last 16th one)",
    ),
    Statistic(
        name="batch_statistics_gap",
        axis="layer",
        tier="deep",
        unit="ratio",
        meaning="Batch normalization in training mode: root mean square over channels of (batch mean - running mean) / "
        "sqrt(running variance + epsilon), the running statistics as they were before this batch.",
        error="exact where the autograd graph keeps the batch's statistics, else of at most 16384 entries",
    ),
    Statistic(
        name="distinct_values",
        axis="layer",
        tier="deep",
        unit="count",
        meaning="Inputs and targets: how many different entries along the first axis (rows, if there are more axes).",
        error="at most 256 rows",
    ),
    Statistic(
        name="column_scale_ratio",
        axis="layer",
        tier="deep",
        unit="ratio",
        meaning="Two-dimensional inputs: largest over smallest root mean square among the columns, zeros left out.",
        error="at most 256 rows",
    ),
    Statistic(
        name="output_std",
        axis="layer",
        tier="deep",
        unit="activation",
        meaning="Standard deviation of all entries: for inputs and targets, their scale about their mean.",
    ),
    Statistic(
        name="row_sum_min",
        axis="layer",
        tier="deep",
        unit="activation",
        meaning="What enters the loss: smallest sum over the last axis. 1 everywhere means probabilities.",
        error="at most 256 rows",
    ),
    Statistic(
        name="row_sum_max",
        axis="layer",
        tier="deep",
        unit="activation",
        meaning="What enters the loss: largest sum over the last axis.",
        error="at most 256 rows",
    ),
    Statistic(
        name="padding_fraction",
        axis="layer",
        tier="deep",
        unit="fraction",
        meaning="Embeddings with a padding index: share of the samples (entries of the first axis) that hold nothing "
        "else, whose row of the embedding gets no gradient.",
    ),
    Statistic(
        name="attention_entropy",
        axis="layer",
        tier="deep",
        unit="fraction",
        meaning="Mean over sampled queries and heads of -sum(A log A) / log(keys seen): 1 is uniform, 0 is one key.",
        error="at most 2048 weights (but 8 query rows), of 8 heads, a call",
    ),
    Statistic(
        name="attention_logit_max",
        axis="layer",
        tier="deep",
        unit="logit",
        meaning="Largest |q k / sqrt(d)| among the sampled queries (Wortsman et al. 2023: runs diverged above 1e4).",
        error="at most 256 query rows, of 8 heads, a call: a lower bound",
    ),
    # ---- deep tier, a profile over calls ----------------------------------------------------------------------
    Statistic(
        name="call_signal_norm",
        axis="call",
        tier="deep",
        unit="loss / activation",
        meaning="`signal_norm` of each call of a layer that is called several times in a step, in the order of the "
        "calls: the gradient signal through time of a recurrent cell.",
    ),
)

STATISTICS: dict[str, Statistic] = {statistic.name: statistic for statistic in _CATALOG}
"""Every statistic by its name."""
