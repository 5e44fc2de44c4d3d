// Charts of numbers over time: loss, update ratio, activations, gradient norm, learning rate, cost.

const MARKS_Y = "y2"; // an axis from 0 to 1 over the same field, for marks that have no value of their own

/** Band, line and lonely points of a series. A line of one point between two gaps would not be seen. */
function lineTraces(line, { name, color, dash = "solid", width = 1.8, log = false, band = true, step = false, legend = true }) {
  const traces = [];
  if (band && line.low && line.high) traces.push(bandTrace(line, line.low, line.high, { color, log }));
  traces.push({
    type: "scatter", mode: "lines", name, x: line.x, y: line.mid, connectgaps: false, showlegend: legend,
    line: { color, dash, width, shape: step ? "hv" : "linear", simplify: true },
  });
  const alone = lonely(line.mid);
  if (alone.length) {
    traces.push({
      type: "scatter", mode: "markers", showlegend: false, marker: { color, size: 6 },
      x: alone.map((i) => line.x[i]), y: alone.map((i) => line.mid[i]),
    });
  }
  return traces;
}

function lonely(values) {
  const found = [];
  for (let i = 0; i < values.length; i++) {
    if (finite(values[i]) && !finite(values[i - 1]) && !finite(values[i + 1])) found.push(i);
  }
  return found;
}

/** The area between two series: one closed polygon for each stretch without a gap. */
function bandTrace(line, low, high, { color, log = false, alpha = 0.16, name, legend = false, floor = lowest(low, log) }) {
  const x = [];
  const y = [];
  const there = (i) => finite(low[i]) && finite(high[i]) && !(log && high[i] <= 0);
  for (let i = 0; i < low.length; i++) {
    if (!there(i)) continue;
    let end = i;
    while (end + 1 < low.length && there(end + 1)) end++;
    for (let k = i; k <= end; k++) { x.push(line.x[k]); y.push(high[k]); }
    for (let k = end; k >= i; k--) { x.push(line.x[k]); y.push(Math.max(low[k], floor)); }
    x.push(line.x[i], null);
    y.push(high[i], null);
    i = end;
  }
  return {
    type: "scatter", mode: "lines", fill: "toself", fillcolor: faded(color, alpha), line: { width: 0, color: faded(color, alpha) },
    x, y, name, showlegend: legend,
  };
}

/** Where a band ends that reaches down to zero on a scale of powers, which has no zero. */
const lowest = (values, log) => (log ? (span(values, (value) => value > 0)?.[0] ?? 1e-300) : -Infinity);

const marksAxis = { overlaying: "y", range: [0, 1], visible: false, fixedrange: true };

/** A cross at the top wherever a reading was NaN or infinite. */
function nonfiniteTrace(line, name = "NaN or Inf") {
  const bins = [...line.nonfinite.keys()].filter((i) => line.nonfinite[i] > 0);
  if (!bins.length) return [];
  return [{
    type: "scatter", mode: "markers", name, x: bins.map((i) => line.x[i]), y: bins.map(() => 0.965), yaxis: MARKS_Y,
    marker: { symbol: "x", size: 8, color: colour("nonfinite") }, cliponaxis: false,
  }];
}

function reading(line, x, name, color, what) {
  const bin = nearest(line.x, x);
  if (bin < 0) return null;
  const lost = line.nonfinite[bin];
  const spread = line.low && finite(line.low[bin]) && line.low[bin] !== line.high[bin]
    ? ` (${written(line.low[bin])} – ${written(line.high[bin])})` : "";
  let value = finite(line.mid[bin]) ? `${written(line.mid[bin], 4)}${spread}${what ? ` ${what}` : ""}` : "not recorded";
  if (lost) value = finite(line.mid[bin]) ? `${value}, ${lost} not finite` : "NaN or Inf";
  return { colour: color, name, value };
}

/** What the tip says at a step: every series there, by the first one's bins. */
function readingsOf(series) {
  return (x) => {
    const lead = series.find((each) => each.line.x.length)?.line;
    if (!lead) return null;
    const bin = nearest(lead.x, x);
    return { title: stepsOf(lead, bin), rows: series.map((s) => reading(s.line, x, s.name, s.color, s.unit)).filter(Boolean) };
  };
}

/** `from 2.31 at step 0 to 0.12 at step 199; lowest 0.11 (step 180), highest 2.4 (step 3)` */
function inWords(line, what = "") {
  const bins = [...line.mid.keys()].filter((i) => finite(line.mid[i]));
  const lost = line.nonfinite.reduce((sum, count) => sum + count, 0);
  const tail = lost ? `; ${counted(lost, "reading")} not finite` : "";
  if (!bins.length) return `no finite reading${tail}`;
  const value = (i) => `${written(line.mid[i], 4)}${what ? ` ${what}` : ""} at ${stepsOf(line, i)}`;
  if (bins.length === 1) return `${value(bins[0])}${tail}`;
  const lowest = bins.reduce((best, i) => (line.mid[i] < line.mid[best] ? i : best));
  const highest = bins.reduce((best, i) => (line.mid[i] > line.mid[best] ? i : best));
  return `from ${value(bins[0])} to ${value(bins.at(-1))}; lowest ${value(lowest)}, highest ${value(highest)}${tail}`;
}

/** The sentence of why something is not there: the run's own, or a plain one. */
function absentSentence(subject, statistics, otherwise) {
  const given = subject.missing.filter((each) => statistics.includes(each.statistic));
  return given.length ? [...new Set(given.map((each) => each.why))].join(" ") : otherwise;
}

/** One chart of step statistics: `pick(subject)` gives [{statistic, name, color, …}]. */
function lineChart({ id, section, pick, absent, height = 230, log, title, on = [], extra }) {
  return {
    id, section, kind: "time", on: ["subject", "range", "tail", ...on],
    build() {
      const shownViews = views();
      if (!shownViews.length) return { absent: "" };
      const series = shownViews.flatMap((view) => pick(view.subject).map((each, _, own) => ({
        ...each, view,
        line: view.subject.lines[each.statistic],
        // Dashes alone are hard to follow: where a colour is free, the second run has one of its own.
        color: colour(view.place && own.length === 1 ? "series-2" : each.color),
        name: `${each.name ?? label(each.statistic)}${view.suffix}`,
        unit: unit(view.dataset, each.statistic),
      })));
      if (!series.length) return { absent: absent(shownViews[0].subject) };
      const pairs = series.map((each) => [each.line.x, each.line.mid]);
      const powers = log ?? wantsLog(pairs);
      const marks = extra?.(shownViews) ?? { traces: [], annotations: [], shapes: [] };
      const lost = series.flatMap((each) => nonfiniteTrace(each.line)).slice(0, 1);
      const traces = [
        ...series.flatMap((each) => lineTraces(each.line, { ...each, dash: each.view.place ? "dash" : each.dash, log: powers })),
        ...lost, ...marks.traces,
      ];
      const legend = series.length > 1 || lost.length > 0 || marks.traces.length > 0;
      const layout = timeLayout(shownViews[0].subject, {
        height, log: powers, legend, unit: series[0].unit, range: valueRange(pairs, powers),
        margin: marks.annotations.length ? { t: (legend ? 34 : 10) + 17 * marks.levels } : {},
      });
      // Names of causes stand between field and legend.
      if (marks.annotations.length) layout.legend.y = 1 + (17 * marks.levels) / (height - layout.margin.t - MARGIN.b);
      return {
        traces,
        layout: { ...layout, yaxis2: marksAxis, annotations: marks.annotations, shapes: marks.shapes },
        height,
        statistics: series.map((each) => each.statistic),
        words: `${title}. ${series.map((each) => `${each.name}: ${inWords(each.line, each.unit)}`).join(". ")}.${marks.words ?? ""}`,
        readings: (x, y) => {
          const found = readingsOf(series)(x, y);
          if (found && marks.notes) found.notes = marks.notes(x);
          return found;
        },
      };
    },
  };
}

// ---- loss, with what happened ----

const SYMBOLS = { info: "triangle-up", warning: "diamond", error: "square" };
const RANK = { info: 0, warning: 1, error: 2 };
const MOST_EVENTS = 300; // drawn; the table has them all

function lossMarks(shownViews) {
  const { subject, dataset } = shownViews[0];
  const causes = startsOfCauses(dataset, subject);
  const events = [...subject.events].sort((a, b) => (RANK[b.level] ?? 0) - (RANK[a.level] ?? 0)).slice(0, MOST_EVENTS);
  const traces = Object.entries(SYMBOLS).flatMap(([name, symbol]) => {
    const some = events.filter((event) => (event.level ?? "info") === name && finite(event.step));
    return some.length ? [{
      type: "scatter", mode: "markers", name: `event (${name})`, yaxis: MARKS_Y, cliponaxis: false,
      x: some.map((event) => event.step), y: some.map(() => 0.03),
      marker: { symbol, size: 9, color: colour({ info: "series-1", warning: "warn", error: "bad" }[name]), line: { width: 1, color: colour("panel") } },
    }] : [];
  });
  const [from, to] = stepRange();
  const levels = Math.min(3, causes.length);
  return {
    traces, levels,
    shapes: causes.map((cause) => ({
      type: "line", x0: cause.step, x1: cause.step, yref: "paper", y0: 0, y1: 1,
      line: { color: colour(cause.level === "error" ? "bad" : cause.level === "warning" ? "warn" : "series-1"), width: 1.3, dash: "dot" },
    })),
    annotations: causes.filter((cause) => cause.step >= from && cause.step <= to).map((cause, i) => ({
      x: cause.step, y: 1, yref: "paper", yanchor: "bottom", yshift: 1 + 17 * (i % 3), showarrow: false,
      // In the right half names end at their line, so that none leaves the picture.
      xanchor: cause.step > (from + to) / 2 ? "right" : "left",
      text: plotText(cause.names), font: { size: 11.5, color: colour(cause.level === "error" ? "bad" : cause.level === "warning" ? "warn" : "accent") },
    })),
    words: (causes.length ? ` Causes begin: ${causes.map((cause) => `${cause.names} at step ${cause.step}`).join(", ")}.` : "")
      + (subject.events.length ? ` ${counted(subject.events.length, "event")}, listed below.` : ""),
    notes: (x) => [
      ...causes.filter((cause) => Math.abs(cause.step - x) < 0.012 * (to - from)).map((cause) => `${cause.names} begins at step ${cause.step}`),
      ...events.filter((event) => Math.abs(event.step - x) < 0.012 * (to - from)).slice(0, 4).map((event) => `step ${event.step}: ${event.text}`),
    ],
  };
}

/** Causes by the step at which they begin, [{step, names, level}], the earliest first; those at info are left to words. */
function startsOfCauses(dataset, subject) {
  const steps = new Map();
  for (const cause of dataset.verdict?.causes ?? []) {
    if (cause.level === "info" || !finite(cause.first_step)) continue;
    if (cause.subject && cause.subject !== subject.name) continue;
    steps.set(cause.first_step, [...(steps.get(cause.first_step) ?? []), cause]);
  }
  return [...steps].sort((a, b) => a[0] - b[0]).map(([step, causes]) => ({
    step,
    names: listed([...new Set(causes.map((cause) => cause.name))], narrow() ? 1 : 2),
    level: causes.some((cause) => cause.level === "error") ? "error" : "warning",
  }));
}

/** Plotly reads some HTML in texts: nothing of a name may be taken for it. */
const plotText = (text) => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

const lossChart = lineChart({
  id: "loss", section: "loss", title: "Loss over steps", height: 300,
  pick: (subject) => (subject.lines.loss ? [{ statistic: "loss", color: "series-1" }] : []),
  absent: (subject) => absentSentence(subject, ["loss"], "No loss was recorded."),
  extra: lossMarks,
});

// ---- gradient norm, clipping, learning rate, loss scale, cost ----

const gradientChart = lineChart({
  id: "gradients", section: "gradients", title: "Norm of all gradients over steps", log: undefined,
  pick(subject) {
    const { global_grad_norm: after, global_grad_norm_unclipped: before } = subject.lines;
    const clipped = before && after && before.mid.some((value, i) => finite(value) && value > after.mid[i] * (1 + 1e-6));
    return [
      ...(before && (clipped || !after) ? [{ statistic: "global_grad_norm_unclipped", color: "series-5" }] : []),
      ...(after ? [{ statistic: "global_grad_norm", color: "series-1", name: clipped ? "after clipping" : "gradient norm" }] : []),
    ];
  },
  absent: (subject) => absentSentence(subject, ["global_grad_norm", "global_grad_norm_unclipped"], "No gradient norm was recorded."),
});

const varies = (line) => {
  const seen = line && span(line.mid);
  return Boolean(seen) && seen[0] !== seen[1];
};

const clipChart = lineChart({
  id: "clip", section: "gradients", title: "Factor that clipping multiplied the gradients with", height: 170,
  pick: (subject) => (subject.lines.clip_factor && (span(subject.lines.clip_factor.mid)?.[0] ?? 1) < 1
    ? [{ statistic: "clip_factor", color: "series-2", name: "clip factor" }] : []),
  absent: (subject) => (subject.lines.clip_factor
    ? "The gradient was never clipped." : absentSentence(subject, ["clip_factor"], "")),
});

const scaleChart = lineChart({
  id: "scale", section: "gradients", title: "Loss scale", height: 170, log: true,
  pick: (subject) => (varies(subject.lines.loss_scale) || (span(subject.lines.loss_scale?.mid ?? [])?.[0] ?? 1) !== 1
    ? [{ statistic: "loss_scale", color: "series-4", step: true }] : []),
  absent: () => "",
});

const SERIES = ["series-1", "series-2", "series-3", "series-4", "series-5", "series-6"];

const rateChart = lineChart({
  id: "rate", section: "rate", title: "Learning rate over steps",
  pick(subject) {
    const groups = Object.keys(subject.lines).filter((name) => name.startsWith("learning_rate"));
    // Groups that share their rate are one line.
    const different = groups.filter((name, i) => !groups.slice(0, i).some((other) => same(subject.lines[name], subject.lines[other])));
    return different.slice(0, SERIES.length).map((statistic, i) => ({
      statistic, color: SERIES[i], step: true,
      name: different.length === 1 ? "learning rate" : `group ${statistic.match(/\[(\d+)\]/)?.[1] ?? i}`,
    }));
  },
  absent: (subject) => absentSentence(subject, ["learning_rate"], "No learning rate was recorded."),
});

const same = (one, other) => one.mid.length === other.mid.length
  && one.mid.every((value, i) => Object.is(value, other.mid[i]));

const costChart = lineChart({
  id: "overhead", section: "overhead", title: "Wall time of a step and of watching it", height: 200, log: true,
  pick: (subject) => [
    ...(subject.lines.step_seconds ? [{ statistic: "step_seconds", color: "series-plain" }] : []),
    ...(subject.lines.watch_seconds ? [{ statistic: "watch_seconds", color: "series-2" }] : []),
  ],
  absent: (subject) => absentSentence(subject, ["watch_seconds", "step_seconds"], ""),
});

// ---- bands over layers or parameters: update ratio, saturation, dead units ----

/** Median, middle 80 % and extremes over all rows of a map, and the chosen layer's own rows on top. */
function bandChart({ id, section, statistic, color, log, title, absent, rule, always = [], range, height = 240 }) {
  return {
    id, section, kind: "time", on: ["subject", "range", "layer"],
    build() {
      const shownViews = views().filter((view) => view.subject.maps[statistic]?.names.length);
      if (!shownViews.length) {
        const subject = views()[0]?.subject;
        return { absent: subject ? absentSentence(subject, [statistic], absent) : "" };
      }
      const what = unit(shownViews[0].dataset, statistic);
      const parts = shownViews.map((view) => ({ view, map: view.subject.maps[statistic], all: summary(view.subject.maps[statistic]) }));
      const own = parts.flatMap((part) => chosenRows(part));
      const powers = log && parts.some(({ all }) => span(all.high, (value) => value > 0));
      const pairs = parts.flatMap(({ all }) => [[all.x, all.low], [all.x, all.above], [all.x, all.high]]);
      const room = range ?? valueRange(pairs, powers, always) ?? (powers ? [1e-4, 1e-2] : [0, 1]);
      const traces = [...parts.flatMap((part) => bandTraces(part, { color: colour(color), log: powers, several: parts.length > 1, floor: powers ? room[0] : -Infinity })),
        ...own.flatMap((each) => lineTraces(each.line, { ...each, width: 2.2 })), ...parts.flatMap(({ all }) => nonfiniteTrace(all)).slice(0, 1)];
      const layout = timeLayout(shownViews[0].subject, {
        height, log: powers, legend: true, unit: what, range: room,
      });
      return {
        traces,
        layout: { ...layout, yaxis2: marksAxis, ...(rule && powers ? ruleOfThumb(rule) : {}) },
        height,
        statistics: [statistic],
        caption: [el("span", { class: "title" }, title)],
        words: `${title}. ${parts.map(({ view, map, all }) =>
          `Median over ${counted(map.names.length, map.byParameter ? "parameter" : "layer")}${view.suffix}: ${inWords({ ...all, low: null })}. Largest of all ${inWords({ ...all, mid: all.high, nonfinite: [] })}`).join(". ")}.${rule ? ` ${rule.words}` : ""}`,
        readings: bandReadings(parts, own, what, colour(color)),
      };
    },
  };
}

function bandTraces({ view, all }, { color, log, several, floor }) {
  const name = `median${view.suffix}`;
  const median = lineTraces({ ...all, low: null }, { name, color, dash: view.dash });
  if (view.place) return median; // two runs' bands on top of each other would hide both
  return [
    bandTrace(all, all.low, all.high, { color, log, floor, alpha: 0.1, name: "all", legend: true }),
    ...(several ? [] : [bandTrace(all, all.tenth, all.ninetieth, { color, log, floor, alpha: 0.22, name: "middle 80 %", legend: true })]),
    ...median,
  ];
}

function chosenRows({ view, map }) {
  if (state.layer === null) return [];
  const rows = map.layers.flatMap((layer, row) => (layer === state.layer ? [row] : [])).slice(0, 4);
  return rows.map((row, i) => ({
    line: rowLine(map, row), name: `${plotText(map.names[row])}${view.suffix}`, plain: `${map.names[row]}${view.suffix}`,
    color: colour(["series-2", "series-4", "series-3", "series-5"][i]), dash: view.dash,
  }));
}

function ruleOfThumb({ value, text }) {
  return {
    shapes: [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: value, y1: value, line: { color: colour("muted"), width: 1.2, dash: "dash" } }],
    annotations: [{
      xref: "paper", x: 1, xanchor: "right", y: Math.log10(value), yanchor: "bottom", showarrow: false,
      text, font: { size: 11.5, color: colour("muted") }, bgcolor: faded(colour("panel"), 0.75),
    }],
  };
}

function bandReadings(parts, own, what, color) {
  const after = what && what !== "ratio" && what !== "fraction" ? ` ${what}` : "";
  return (x) => {
    const bin = nearest(parts[0].all.x, x);
    if (bin < 0) return null;
    return {
      title: stepsOf(parts[0].all, bin),
      rows: [
        ...parts.flatMap(({ view, all, map }) => {
          const i = nearest(all.x, x);
          const value = (values) => `${written(values[i])}${after}`;
          return [
            { colour: color, name: `largest${extreme(map, i, all.high[i])}${view.suffix}`, value: value(all.high) },
            { colour: color, name: `median${view.suffix}`, value: value(all.mid) },
            { colour: color, name: `smallest${extreme(map, i, all.low[i])}${view.suffix}`, value: value(all.low) },
          ];
        }),
        ...own.map((each) => reading(each.line, x, each.plain, each.color, after.trim())).filter(Boolean),
      ],
    };
  };
}

/** ` (net.3.weight)`: whose value it is. */
function extreme(map, bin, value) {
  for (let row = 0; row < map.names.length; row++) if (at(map, row, bin) === value) return ` (${map.names[row]})`;
  return "";
}

const updateChart = bandChart({
  id: "updates", section: "updates", statistic: "update_ratio", color: "series-1", log: true,
  title: "Update to weight ratio over all parameters", absent: "No update ratio was recorded.", always: [1e-3],
  rule: { value: 1e-3, text: "1e-3, a rule of thumb", words: "About 1e-3 is usual; that is a rule of thumb, no limit." },
});

const saturationChart = bandChart({
  id: "saturation", section: "activations", statistic: "saturation", color: "series-2", range: [-0.03, 1.03],
  title: "Saturated share, over the layers with a bounded activation", height: 220,
  absent: "No layer has an activation that can saturate, so no saturation was recorded.",
});

const deadChart = bandChart({
  id: "dead", section: "activations", statistic: "dead_fraction", color: "series-3", range: [-0.03, 1.03],
  title: "Dead units, over the activation layers", height: 220,
  absent: "No dead units were recorded.",
});
