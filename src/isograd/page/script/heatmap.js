// Layers by steps: a row for each layer, colour for size. Zero and what is not finite have colours of their own.

const FRACTIONS = new Set(["saturation", "dead_fraction"]); // and whatever says that its unit is "fraction"
const CROSSES = 250; // cells that are not finite get a cross as well, as long as crosses can be told apart

function heatmapStatistic(subject) {
  return state.statistic ?? Object.keys(subject.maps)[0] ?? null;
}

function heatChart(place) {
  return {
    id: place ? "signal-b" : "signal", section: "signal", kind: "time", on: ["subject", "range", "statistic"],
    build() {
      const view = views()[place];
      if (!view) return { absent: "" };
      const statistic = heatmapStatistic(views()[0].subject);
      // Zoomed in on a live page, the server has given that stretch in full.
      const map = view.subject.detail?.[statistic] ?? view.subject.maps[statistic];
      if (!map?.names.length) {
        const otherwise = place ? "The second run has no such readings." : "Nothing was recorded per layer.";
        return { absent: absentSentence(view.subject, statistic ? [statistic] : ["signal_norm"], otherwise) };
      }
      return heatmap(view, map);
    },
  };
}

function heatmap(view, map) {
  const linear = FRACTIONS.has(map.statistic) || unit(view.dataset, map.statistic) === "fraction";
  const scale = linear ? { low: 0, high: 1 } : sharedScale(map.statistic);
  const cells = colouring(map, linear);
  // Two runs side by side are of one height, so that their steps stand level.
  const height = heatHeight(Math.max(...views().map((each) => each.subject.maps[map.statistic]?.names.length ?? 0)));
  const what = unit(view.dataset, map.statistic);
  return {
    traces: heatTraces(map, cells, scale, linear),
    layout: heatLayout(view, map, height),
    height,
    caption: heatCaption(view, map, cells),
    statistics: view.place ? [] : [map.statistic],
    words: heatWords(view, map, cells, what),
    readings: (x, y) => heatReading(map, x, y, what),
    pick: (x, y) => picked(view, map, x, y),
    row(layer) {
      const first = map.layers.indexOf(layer);
      return first < 0 ? null : [first, map.layers.lastIndexOf(layer)];
    },
  };
}

const heatHeight = (rows) => Math.round(Math.max(190, Math.min(rows <= 60 ? 820 : 720, rows * 17 + 100)));

/** log10 of what is above zero (the value itself on a linear scale), and the special cells: 1 zero, 2 not finite. */
function colouring(map, linear) {
  const z = new Float32Array(map.values.length).fill(NaN);
  const special = new Float32Array(map.values.length).fill(NaN);
  let zeros = 0;
  let missing = 0;
  for (let cell = 0; cell < z.length; cell++) {
    const value = map.values[cell];
    if (Number.isNaN(value) && !map.counts.has(cell)) missing++;
    if (linear) z[cell] = value;
    else if (value > 0) z[cell] = Math.log10(value);
    else if (value === 0) { special[cell] = 1; zeros++; } else if (value < 0) z[cell] = Math.log10(-value);
  }
  for (const cell of map.counts.keys()) special[cell] = 2;
  return { z, special, zeros, missing, nonfinite: map.counts.size };
}

/** One scale for both runs of a comparison, in decades. */
function sharedScale(statistic) {
  let low = Infinity;
  let high = -Infinity;
  for (const view of views()) {
    const seen = span((view.subject.maps[statistic]?.values ?? []).map(Math.abs), (value) => value > 0);
    if (!seen) continue;
    low = Math.min(low, Math.log10(seen[0]));
    high = Math.max(high, Math.log10(seen[1]));
  }
  if (low > high) return { low: -1, high: 1 };
  return high - low < 0.3 ? { low: low - 0.15, high: high + 0.15 } : { low, high };
}

/** A column stands until the next reading: early ones, which are dense, are narrow and late ones wide. */
function edges(map) {
  const found = new Float64Array(map.bins + 1);
  for (let bin = 0; bin < map.bins; bin++) found[bin] = map.first[bin] - 0.5;
  const end = map.last[map.bins - 1];
  const before = map.bins > 1 ? end - map.last[map.bins - 2] : 0;
  found[map.bins] = Math.min(end + Math.max(before, 0), Math.max(map.until, end)) + 0.5;
  return found;
}

function rows2d(values, map) {
  return Array.from(map.names, (_, row) => values.subarray(row * map.bins, (row + 1) * map.bins));
}

function heatTraces(map, { z, special, zeros, nonfinite }, { low, high }, linear) {
  const x = edges(map);
  const powers = linear ? [0, 0.25, 0.5, 0.75, 1] : decades(low, high);
  const traces = [{
    type: "heatmap", x, y0: 0, dy: 1, z: rows2d(z, map), zmin: low, zmax: high, colorscale: "Viridis", hoverinfo: "skip", zsmooth: false,
    colorbar: {
      orientation: "h", thickness: 10, len: tight() ? 0.96 : 0.42, x: 1, xanchor: "right", y: 1, yanchor: "bottom", ypad: 6, outlinewidth: 0,
      tickvals: powers, ticktext: powers.map((power) => (linear ? written(power) : written(10 ** power, 2))),
      tickangle: 0, tickfont: { size: 11, color: colour("muted") }, ticklabelposition: "outside top",
    },
  }];
  if (zeros + nonfinite) {
    traces.push({
      type: "heatmap", x, y0: 0, dy: 1, z: rows2d(special, map), zmin: 1, zmax: 2, showscale: false, hoverinfo: "skip", zsmooth: false,
      colorscale: [[0, colour("zero")], [0.5, colour("zero")], [0.5, colour("nonfinite")], [1, colour("nonfinite")]],
    });
  }
  if (nonfinite && nonfinite <= CROSSES) {
    const cells = [...map.counts.keys()];
    traces.push({
      type: "scatter", mode: "markers", showlegend: false, hoverinfo: "skip",
      x: cells.map((cell) => map.x[cell % map.bins]), y: cells.map((cell) => Math.floor(cell / map.bins)),
      marker: { symbol: "x-thin", size: 7, line: { width: 1.4, color: "#000" } },
    });
  }
  return traces;
}

/** Little room beside the scale: a small screen, or two heatmaps on one. */
const tight = () => narrow() || runs.length > 1;

function decades(low, high) {
  const most = tight() ? 4 : 6;
  const [from, to] = [Math.ceil(low - 1e-9), Math.floor(high + 1e-9)];
  if (to - from < 1) return [low, high];
  const stride = Math.max(1, Math.ceil((to - from) / most));
  const found = [];
  for (let power = from; power <= to; power += stride) found.push(power);
  return found;
}

function heatLayout(view, map, height) {
  const layout = timeLayout(view.subject, { height, margin: { t: 54 } });
  const count = map.names.length;
  const stride = Math.max(1, Math.ceil((count * 15) / (height - 54 - MARGIN.b)));
  const rows = [...map.names.keys()].filter((row) => row % stride === 0);
  Object.assign(layout.yaxis, {
    autorange: false, range: [count - 0.5, -0.5], fixedrange: false, uirevision: `${zooms} ${map.statistic} ${count}`,
    showgrid: false, showticklabels: true, tickmode: "array", tickvals: rows, ticktext: rows.map((row) => plotText(shortened(map.names[row]))), ticks: "",
  });
  layout.xaxis.showgrid = false;
  return layout;
}

/** Choice of statistic (once, over the first heatmap) and the legend of the special colours. */
function heatCaption(view, map, cells) {
  const parts = [];
  if (view.place === 0) {
    const choice = el("select", { id: "statistic", onchange: (event) => go({ statistic: event.target.value }) },
      Object.keys(view.subject.maps).map((name) => el("option", { value: name, selected: name === map.statistic }, label(name))));
    parts.push(el("label", {}, "Show", choice));
  }
  if (runs.length > 1) parts.push(el("span", { class: "title" }, runName(view.dataset, view.place)));
  const swatch = (name, words) => {
    const box = el("i", {});
    box.style.background = name === "none" ? "transparent" : `var(--${name})`;
    return el("span", {}, box, words);
  };
  parts.push(el("span", { class: "swatches" },
    cells.zeros ? swatch("zero", "exactly zero") : null,
    cells.nonfinite ? swatch("nonfinite", "NaN or Inf") : null,
    cells.missing ? swatch("none", "not recorded") : null));
  // Deep readings are spaced so that watching stays cheap: an empty right side is no fault of the run.
  const whole = view.subject.maps[map.statistic];
  const end = whole.last[whole.bins - 1];
  if (end < 0.9 * map.until) parts.push(el("span", {}, `Last read at step ${end} of ${map.until}.`));
  return parts;
}

function heatWords(view, map, cells, what) {
  const bin = map.bins - 1;
  const rows = [...map.names.keys()].filter((row) => finite(at(map, row, bin)));
  const name = `${label(map.statistic)} of ${counted(map.names.length, map.byParameter ? "parameter" : "layer")} over ${counted(map.bins, "column")} of steps${view.suffix}`;
  const special = `${cells.zeros ? ` ${counted(cells.zeros, "cell")} exactly zero.` : ""}${cells.nonfinite ? ` ${counted(cells.nonfinite, "cell")} not finite.` : ""}`;
  if (!rows.length) return `${name}.${special}`;
  const value = (row) => `${written(at(map, row, bin))}${what ? ` ${what}` : ""} in ${map.names[row]}`;
  const least = rows.reduce((best, row) => (at(map, row, bin) < at(map, best, bin) ? row : best));
  const most = rows.reduce((best, row) => (at(map, row, bin) > at(map, best, bin) ? row : best));
  return `${name}. At ${stepsOf(map, bin)}: smallest ${value(least)}, largest ${value(most)}.${special}`;
}

function cellAt(map, x, y) {
  const row = Math.round(y);
  const [from, to] = [map.first[0] - 0.5, edges(map)[map.bins]];
  const bin = x < from || x > to ? -1 : binOf(map, Math.round(x));
  return row < 0 || row >= map.names.length || bin < 0 || bin >= map.bins ? null : { row, bin };
}

function heatReading(map, x, y, what) {
  const cell = cellAt(map, x, y);
  if (!cell) return null;
  const value = at(map, cell.row, cell.bin);
  const lost = map.counts.get(cell.row * map.bins + cell.bin);
  const rows = [{ name: label(map.statistic), value: finite(value) ? `${written(value)}${what ? ` ${what}` : ""}` : lost ? "NaN or Inf" : "not recorded" }];
  return {
    title: map.names[cell.row],
    rows,
    notes: [stepsOf(map, cell.bin), ...(lost && finite(value) ? [`${counted(lost, "reading")} not finite`] : [])],
  };
}

function picked(view, map, x, y) {
  const cell = cellAt(map, x, y);
  if (!cell) return null;
  const layer = map.layers[cell.row];
  const step = Math.round(Math.max(map.first[cell.bin], Math.min(map.last[cell.bin], x)));
  return view.place === 0 && layer ? { layer, step } : { step };
}
