// The gradient over depth at one step: first and last step for comparison, theory's prediction where there is one.

/** [{name, row}] from input to loss, and the map that they are rows of; null where nothing was read per layer. */
function depthRows(subject) {
  const map = subject.maps.signal_norm ?? subject.maps.grad_norm;
  if (!map) return null;
  const wanted = map.byParameter || !subject.depth?.layers?.length
    ? map.names : subject.depth.layers.map((index) => subject.layers[index]?.name);
  const rowOf = new Map(map.names.map((name, row) => [name, row]));
  const rows = wanted.map((name, place) => ({ name, place, row: rowOf.get(name) })).filter((each) => each.row !== undefined);
  return rows.length ? { map, rows } : null;
}

const heldBin = (map) => (state.step === null ? map.bins - 1 : Math.max(0, binOf(map, state.step)));

const depthChart = {
  id: "depth", section: "depth", kind: "depth", on: ["subject", "step", "layer"],
  build() {
    const found = views().map((view) => ({ view, profile: depthRows(view.subject) })).filter((each) => each.profile?.map.bins);
    if (!found.length || found[0].view.place) {
      const subject = views()[0]?.subject;
      return { absent: subject ? absentSentence(subject, ["signal_norm"], "No gradient was recorded per layer.") : "" };
    }
    const { view, profile: { map, rows } } = found[0];
    const what = unit(view.dataset, map.statistic);
    const curves = depthCurves(found);
    const values = curves.map((curve) => [rows.map(() => 0), curve.y]);
    const range = depthRange(values);
    const height = rows.length > 1 ? 380 : 260;
    return {
      traces: curves.flatMap((curve) => depthTraces(curve, range)),
      layout: depthLayout(rows, { height, range, what, highlighted: rows.findIndex((each) => each.name === state.layer || map.layers[each.row] === state.layer) }),
      height,
      caption: [stepper(map), predictionOf(view.subject, map) ? el("span", { class: "small" }, `Dotted: ${predictionOf(view.subject, map).source}`) : ""],
      statistics: [map.statistic],
      words: depthWords(map, rows, curves, what),
      readings(x) {
        const place = Math.round(x);
        if (!rows[place]) return null;
        return {
          title: rows[place].name,
          rows: curves.map((curve) => ({ colour: curve.color, name: curve.plain, value: depthValue(curve, place, what) })),
        };
      },
      pick: (x) => (rows[Math.round(x)] ? { layer: map.layers[rows[Math.round(x)].row] } : null),
    };
  },
};

function depthCurves(found) {
  const curves = [];
  for (const { view, profile: { map, rows } } of found) {
    const names = found[0].profile.rows;
    const placed = new Map(rows.map((each) => [each.name, each.row]));
    const ofBin = (bin) => names.map((each) => (placed.has(each.name) ? at(map, placed.get(each.name), bin) : NaN));
    const lost = (bin) => names.map((each) => map.counts.get(placed.get(each.name) * map.bins + bin) ?? 0);
    const add = (bin, name, color, more) => curves.push({
      name: `${name}${view.suffix}`, plain: `${name}, ${stepsOf(map, bin)}${view.suffix}`, color: colour(color), y: ofBin(bin), lost: lost(bin), ...more,
    });
    const held = heldBin(map);
    if (view.place === 0) {
      if (map.bins > 1 && held !== map.bins - 1) add(map.bins - 1, "last", "series-6", { width: 1.6 });
    }
    add(held, held === map.bins - 1 ? "last" : `step ${map.first[held]}`, view.place ? "series-2" : "series-1", { width: 2.4, dash: view.dash, markers: true });
    // On top, for where nothing has changed since.
    if (view.place === 0 && map.bins > 1 && held !== 0) add(0, "first", "series-5", { width: 1.8, dash: "dash" });
    const prediction = predictionOf(view.subject, map);
    if (view.place === 0 && prediction) {
      const values = rows.map((each) => prediction.values[each.place] ?? NaN);
      curves.push({ name: "theory", plain: "theory", color: colour("series-4"), y: values, lost: [], dash: "dot", width: 2 });
    }
  }
  return curves;
}

function predictionOf(subject, map) {
  const prediction = subject.depth?.prediction;
  return prediction?.statistic === map.statistic ? prediction : null;
}

function depthRange(pairs) {
  const seen = span(pairs.flatMap(([, values]) => values), (value) => value > 0);
  if (!seen) return [1e-3, 1];
  // A flat profile must look flat: never less than a decade on either side.
  const middle = (Math.log10(seen[0]) + Math.log10(seen[1])) / 2;
  const half = Math.max(1, (Math.log10(seen[1]) - Math.log10(seen[0])) / 2 * 1.12);
  return [10 ** (middle - half), 10 ** (middle + half)];
}

function depthTraces(curve, [low, high]) {
  const places = [...curve.y.keys()];
  const traces = [{
    type: "scatter", mode: curve.markers || places.length < 2 ? "lines+markers" : "lines", name: plotText(curve.name), connectgaps: false,
    x: places, y: curve.y.map((value) => (value > 0 ? value : null)),
    line: { color: curve.color, width: curve.width, dash: curve.dash }, marker: { color: curve.color, size: places.length > 60 ? 3 : 6 },
  }];
  const special = (where, symbol, name, y) => {
    const some = places.filter(where);
    if (some.length) {
      traces.push({
        type: "scatter", mode: "markers", name: plotText(`${name} (${curve.name})`), x: some, y: some.map(() => y), cliponaxis: false,
        marker: { symbol, size: 9, color: curve.color, line: { color: curve.color, width: 2 } },
      });
    }
  };
  special((place) => curve.y[place] === 0, "circle-open", "exactly zero", low * 1.02);
  special((place) => curve.lost[place] > 0 && !finite(curve.y[place]), "x", "NaN or Inf", high / 1.02);
  return traces;
}

function depthLayout(rows, { height, range, what, highlighted }) {
  const width = Math.max(300, byId("main").clientWidth - timeMargin - 40);
  const stride = Math.max(1, Math.ceil((rows.length * 17) / width));
  const places = [...rows.keys()].filter((place) => place % stride === 0);
  const longest = Math.max(...places.map((place) => shortened(rows[place].name).length));
  const flat = rows.length * longest * 7.5 < width;
  const layout = baseLayout({ height: height - (flat ? 0 : 40), log: true, range, unit: what, legend: true, margin: { b: flat ? 44 : Math.min(132, 44 + 4.9 * longest), t: 40 } });
  layout.height = height;
  Object.assign(layout.xaxis, {
    range: [-0.5, rows.length - 0.5], tickmode: "array", tickvals: places, tickangle: flat ? 0 : -50, showgrid: rows.length <= 60,
    ticktext: places.map((place) => plotText(shortened(rows[place].name))), uirevision: `${zooms} ${rows.length}`,
    title: { text: "input → loss", font: { size: 11.5, color: colour("muted") }, standoff: 6 },
  });
  if (highlighted >= 0) {
    layout.shapes = [{
      type: "rect", yref: "paper", y0: 0, y1: 1, x0: highlighted - 0.5, x1: highlighted + 0.5, line: { width: 0 },
      fillcolor: faded(colour("series-2"), 0.16), layer: "below",
    }];
  }
  return layout;
}

function depthValue(curve, place, what) {
  const value = curve.y[place];
  if (finite(value)) return `${written(value)}${what ? ` ${what}` : ""}`;
  return curve.lost[place] ? "NaN or Inf" : "not recorded";
}

function depthWords(map, rows, curves, what) {
  const name = `${label(map.statistic)} over ${counted(rows.length, map.byParameter ? "parameter" : "layer")} from input to loss`;
  const told = curves.map((curve) => {
    const places = [...curve.y.keys()].filter((place) => curve.y[place] > 0);
    const lost = curve.lost.filter(Boolean).length;
    const tail = lost ? `; ${counted(lost, "layer")} not finite` : "";
    if (!places.length) return `${curve.plain}: no value above zero${tail}`;
    const [first, last] = [places[0], places.at(-1)];
    const fall = Math.log10(curve.y[last] / curve.y[first]);
    return `${curve.plain}: ${written(curve.y[first])}${what ? ` ${what}` : ""} in ${rows[first].name}, ${written(curve.y[last])} in ${rows[last].name}, ${written(Math.abs(fall), 2)} decades ${fall >= 0 ? "lower" : "higher"} at the input${tail}`;
  });
  return `${name}. ${told.join(". ")}.`;
}

/** Slider over the recorded steps. It is kept from drawing to drawing, so that a drag is not cut short. */
const sliders = new Map();
function stepper(map) {
  if (!sliders.has("depth")) {
    const input = el("input", { type: "range", min: 0, step: 1, "aria-label": "Step of the depth profile", id: "step" });
    const output = el("output", { for: "step" });
    const first = el("span", {}, "");
    const box = el("div", { class: "stepper" }, output, input, first);
    input.addEventListener("input", () => {
      const current = sliders.get("depth").map;
      const bin = Number(input.value);
      go({ step: bin === current.bins - 1 ? null : current.first[bin] });
    });
    sliders.set("depth", { box, input, output, first });
  }
  const slider = sliders.get("depth");
  const held = heldBin(map);
  slider.map = map;
  slider.input.max = map.bins - 1;
  slider.input.value = held;
  slider.input.disabled = map.bins < 2;
  slider.input.setAttribute("aria-valuetext", stepsOf(map, held));
  slider.output.textContent = stepsOf(map, held);
  slider.first.textContent = `of ${map.last[map.bins - 1]}`;
  return slider.box;
}
