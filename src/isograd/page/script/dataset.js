// A run's data as the page uses it: typed arrays, names looked up, one subject at a time.

const LABELS = {
  signal_norm: "Gradient signal",
  grad_norm: "Gradient norm",
  update_ratio: "Update to weight ratio",
  weight_norm: "Weight norm",
  output_rms: "Output RMS",
  saturation: "Saturated share",
  dead_fraction: "Dead units",
  global_grad_norm: "after clipping",
  global_grad_norm_unclipped: "before clipping",
  watch_seconds: "watching",
  step_seconds: "the whole step",
  loss: "Loss",
  loss_scale: "Loss scale",
};

function label(statistic) {
  if (LABELS[statistic]) return LABELS[statistic];
  const words = statistic.replaceAll("_", " ");
  return words.charAt(0).toUpperCase() + words.slice(1);
}

const MAP_ORDER = [
  "signal_norm", "grad_norm", "update_ratio", "weight_norm", "output_rms", "saturation", "dead_fraction",
];

/** What the page holds of `page_data`; the words are left as they came. */
function opened(raw) {
  return {
    raw,
    run: raw.run ?? {},
    verdict: raw.verdict ?? null,
    treatments: raw.treatments ?? [],
    fix: raw.fix ?? null,
    explain: raw.explain ?? {},
    subjects: (raw.subjects ?? []).map(openedSubject),
  };
}

function openedSubject(raw) {
  const subject = {
    name: raw.name,
    layers: raw.layers ?? [],
    parameters: raw.parameters ?? [],
    groups: raw.groups ?? [],
    events: raw.events ?? [],
    missing: raw.missing ?? [],
    depth: raw.depth ?? null,
    lines: {},
    maps: {},
  };
  for (const [statistic, line] of Object.entries(raw.lines ?? {})) subject.lines[statistic] = openedLine(line);
  for (const statistic of inOrder(Object.keys(raw.maps ?? {}))) {
    subject.maps[statistic] = openedMap(statistic, raw.maps[statistic], subject);
  }
  // The last step that anything was read at: readings of deep steps stand until then.
  const until = stepSpan(subject)?.[1] ?? 0;
  for (const map of Object.values(subject.maps)) map.until = until;
  subject.layerNames = new Set(subject.layers.map((layer) => layer.name));
  return subject;
}

function inOrder(statistics) {
  const place = (name) => (MAP_ORDER.includes(name) ? MAP_ORDER.indexOf(name) : MAP_ORDER.length);
  return [...statistics].sort((a, b) => place(a) - place(b));
}

function centres(first, last) {
  return Float64Array.from(first, (step, i) => (step + last[i]) / 2);
}

function openedLine(raw) {
  const first = decoded(raw.first);
  const last = decoded(raw.last);
  const mid = decoded(raw.mid);
  return {
    first, last, mid,
    x: centres(first, last),
    low: raw.low ? decoded(raw.low) : null,
    high: raw.high ? decoded(raw.high) : null,
    nonfinite: raw.nonfinite ? decoded(raw.nonfinite) : new Float64Array(mid.length),
  };
}

/** Rows are layers or parameters, `values` is row by row; `layers` names the layer of each row. */
function openedMap(statistic, raw, subject) {
  const first = decoded(raw.first);
  const last = decoded(raw.last);
  const byParameter = raw.axis === "parameter";
  const entries = raw.rows.map((index) => (byParameter ? subject.parameters : subject.layers)[index]);
  const counts = new Map((raw.nonfinite ?? []).map(([row, bin, count]) => [row * first.length + bin, count]));
  return {
    statistic, first, last, byParameter, counts,
    x: centres(first, last),
    bins: first.length,
    names: entries.map((entry) => entry.name),
    layers: entries.map((entry) => (byParameter ? entry.layer : entry.name)),
    values: flat(raw.values),
  };
}

/** Small maps come as a list of rows. */
const flat = (values) => decoded(Array.isArray(values) ? values.flat() : values);

const at = (map, row, bin) => map.values[row * map.bins + bin];

/** A row of a map in the shape of a line. */
function rowLine(map, row) {
  const nonfinite = new Float64Array(map.bins);
  for (let bin = 0; bin < map.bins; bin++) nonfinite[bin] = map.counts.get(row * map.bins + bin) ?? 0;
  const mid = map.values.subarray(row * map.bins, (row + 1) * map.bins);
  return { first: map.first, last: map.last, x: map.x, mid, low: null, high: null, nonfinite };
}

/** Over the rows, for each bin: smallest, smallest above zero, 10 %, median, 90 %, largest. Kept, since it sorts every column. */
const summaries = new WeakMap();
function summary(map) {
  if (summaries.has(map)) return summaries.get(map);
  const shares = { low: 0, tenth: 0.1, mid: 0.5, ninetieth: 0.9, high: 1 };
  const result = { first: map.first, last: map.last, x: map.x, nonfinite: new Float64Array(map.bins) };
  for (const name of ["above", ...Object.keys(shares)]) result[name] = new Float64Array(map.bins).fill(NaN);
  for (let bin = 0; bin < map.bins; bin++) {
    const column = new Float64Array(map.names.length);
    let count = 0;
    for (let row = 0; row < map.names.length; row++) {
      const value = at(map, row, bin);
      if (finite(value)) column[count++] = value;
    }
    const sorted = column.subarray(0, count).sort();
    result.above[bin] = sorted.find((value) => value > 0) ?? NaN;
    if (count) for (const [name, share] of Object.entries(shares)) result[name][bin] = quantile(sorted, share);
  }
  for (const [cell, count] of map.counts) result.nonfinite[cell % map.bins] += count;
  summaries.set(map, result);
  return result;
}

/** The layers that j and k walk through: those that something was measured of, in the order of the model. */
function measuredLayers(subject) {
  const measured = new Set(Object.values(subject.maps).flatMap((map) => map.layers));
  return subject.layers.map((layer) => layer.name).filter((name) => measured.has(name));
}

function unit(dataset, statistic) {
  const given = dataset.explain[statistic.replace(/\[\d+\]$/, "")]?.unit;
  return given && given !== "1" ? given : "";
}

/** First and last step that anything was read at, over all of a subject's statistics. */
function stepSpan(subject) {
  let low = Infinity;
  let high = -Infinity;
  for (const series of [...Object.values(subject.lines), ...Object.values(subject.maps)]) {
    if (!series.first.length) continue;
    low = Math.min(low, series.first[0]);
    high = Math.max(high, series.last[series.last.length - 1]);
  }
  return low <= high ? [low, high] : null;
}

/** The bin that holds a step, or the last one before it: what was read then stands until it is read again. */
function binOf(series, step) {
  let bin = nearest(series.first, step);
  if (bin > 0 && series.first[bin] > step) bin -= 1;
  return bin;
}

/** `step 12`, or `steps 10-19` where a bin holds several. */
function stepsOf(series, bin) {
  const [first, last] = [series.first[bin], series.last[bin]];
  return first === last ? `step ${first}` : `steps ${first}–${last}`;
}
