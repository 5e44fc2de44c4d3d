// What all charts share: frame, axes, colours, one cursor, one tip, lazy drawing.
//
// A chart is {id, section, kind: "time" | "depth" | "small" | "plain", on: [state keys], build()}. `build` returns
// {absent: sentence}, or {traces, layout, words, height, caption, readings(x, y), row}: everything that is drawn, and in
// `words` the same for those who cannot see it; `statistics` names what is measured.

const charts = [];
const MARGIN = { r: 18, t: 14, b: 42 };
const coarse = matchMedia("(pointer: coarse)");

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const faded = (hex, alpha) => hex + Math.round(alpha * 255).toString(16).padStart(2, "0");

// ---- frames ----

function addChart(chart, host = byId(chart.section).querySelector(".charts")) {
  chart.plot = el("div", { class: "plot", role: "img", id: `plot-${chart.id}` });
  chart.cursor = el("div", { class: "cursor", hidden: true });
  chart.pin = el("div", { class: "pin", hidden: true });
  chart.mark = el("div", { class: "row-mark", hidden: true });
  // The picture is one image to assistive technology, so its button stands beside it, not inside as plotly's would.
  chart.save = el("button", { type: "button", class: "save", title: "Save as PNG", onclick: () => savePng(chart) }, "PNG");
  chart.frame = el("div", { class: "plot-frame" }, chart.plot, chart.cursor, chart.pin, chart.mark, chart.save);
  chart.caption = el("figcaption");
  chart.about = el("div", { class: "about" });
  chart.figure = el("figure", { id: `chart-${chart.id}` }, chart.caption, chart.frame, chart.about);
  chart.absent = el("p", { class: "absent", hidden: true });
  chart.drawn = false;
  chart.dirty = true;
  chart.inSight = false;
  host.append(chart.figure, chart.absent);
  listen(chart);
  sight.observe(chart.frame);
  charts.push(chart);
  return chart;
}

function dropChart(chart) {
  sight.unobserve(chart.frame);
  if (chart.drawn) Plotly.purge(chart.plot);
  charts.splice(charts.indexOf(chart), 1);
  chart.figure.remove();
  chart.absent.remove();
}

/** Charts are drawn shortly before they come into view: a page of twenty opens as fast as one of two. */
const sight = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    const chart = charts.find((each) => each.frame === entry.target);
    if (!chart) continue;
    chart.inSight = entry.isIntersecting;
    if (chart.inSight && chart.stale) prepare(chart);
    if (chart.inSight) draw(chart);
  }
}, { rootMargin: "500px 0px" });

/** Build anew what depends on the `changed` keys of the state, and draw what is in sight. */
function refresh(changed) {
  for (const chart of charts) {
    if (![...changed].some((key) => key === "theme" || key === "data" || key === "width" || chart.on.includes(key))) continue;
    // New readings alone are worth no work where nobody looks.
    if (changed.has("tail") && changed.size === 1 && !chart.inSight) { chart.stale = true; continue; }
    prepare(chart);
    if (chart.inSight) draw(chart);
  }
  placeMarks();
}

function prepare(chart) {
  const content = chart.build();
  chart.content = content;
  chart.stale = false;
  chart.dirty = true;
  const absent = content.absent !== undefined;
  chart.figure.hidden = absent;
  chart.absent.hidden = !absent || !content.absent;
  chart.absent.textContent = content.absent ?? "";
  if (absent) return;
  chart.frame.style.height = `${content.height}px`;
  chart.plot.setAttribute("aria-label", content.words);
  chart.save.setAttribute("aria-label", `Save ${chart.id.replaceAll("-", " ")} as PNG`);
  showMeaning(chart, content.statistics ?? []);
  if (content.caption) chart.caption.replaceChildren(...content.caption);
}

/** What the drawn statistics mean and how exact they are, for whoever opens it. */
function showMeaning(chart, statistics) {
  const explain = runs[0]?.explain ?? {};
  const told = [...new Set(statistics.map((name) => name.replace(/\[\d+\]$/, "")))].filter((name) => explain[name]);
  show(chart.about, told, () => (told.length ? [details(`about-${chart.id}`, "What is measured",
    el("dl", {}, told.map((name) => el("div", {},
      el("dt", {}, el("code", {}, name), explain[name].unit && explain[name].unit !== "1" ? ` in ${explain[name].unit}` : ""),
      el("dd", {}, `${explain[name].meaning} Error: ${explain[name].error}.`)))))] : []));
}

function draw(chart) {
  if (!window.Plotly || !chart.dirty || !chart.content || chart.content.absent !== undefined) return;
  const width = chart.frame.clientWidth;
  if (!width) return;
  chart.dirty = false;
  const { traces, layout, height } = chart.content;
  Plotly.react(chart.plot, traces, { ...layout, width, height }, CONFIG);
  if (!chart.drawn) {
    chart.drawn = true;
    chart.plot.on("plotly_relayout", (change) => zoomed(chart, change));
  }
  placeMark(chart);
}

function drawAll() {
  for (const chart of charts) draw(chart);
}

// Double clicks and the picture to save are the page's own: see `listen` and `savePng`.
const CONFIG = { displayModeBar: false, displaylogo: false, doubleClick: false, showTips: false };

function savePng(chart) {
  const { width, height } = chart.plot._fullLayout;
  Plotly.downloadImage(chart.plot, { format: "png", scale: 2, width, height, filename: `isograd-${chart.id}` });
}

// ---- axes ----

const narrow = () => byId("main").clientWidth < 560;

/** The left margin of all charts over time, so that their steps stand one below the other. */
let timeMargin = 64;
function setTimeMargin(names) {
  const longest = names.reduce((most, name) => Math.max(most, name.length), 0);
  timeMargin = narrow() ? 62 : Math.max(68, Math.min(176, 16 + 6.4 * longest));
}

/** The end of a long name tells more than its beginning. */
function shortened(name) {
  const most = Math.floor((timeMargin - 14) / 6.2);
  return name.length <= most ? name : `…${name.slice(1 - most)}`;
}

function baseLayout({ height, log = false, range, unit: what = "", legend = false, margin = {} }) {
  const axis = {
    gridcolor: colour("grid"), linecolor: colour("rule"), zeroline: false, tickcolor: colour("rule"),
    tickfont: { size: 11.5, color: colour("muted") }, automargin: false,
  };
  return {
    height,
    uirevision: "kept",
    paper_bgcolor: colour("panel"),
    plot_bgcolor: colour("panel"),
    font: { family: colour("sans"), size: 12, color: colour("text") },
    hovermode: false,
    dragmode: coarse.matches ? false : "zoom",
    showlegend: legend,
    legend: { orientation: "h", x: 0, y: 1, xanchor: "left", yanchor: "bottom", font: { size: 12 }, itemclick: false, itemdoubleclick: false, bgcolor: "rgba(0,0,0,0)" },
    margin: { ...MARGIN, l: timeMargin, t: legend ? 34 : MARGIN.t, ...margin },
    xaxis: { ...axis },
    yaxis: {
      ...axis, type: log ? "log" : "linear", fixedrange: true,
      // Without a range there is nothing to read off: crosses and marks stand in an empty field.
      ...(range ? { range: log ? range.map(Math.log10) : range, ...ticks(range, log, height) } : { range: [0, 1], showticklabels: false }),
      title: { text: what, font: { size: 11.5, color: colour("muted") }, standoff: 4 },
    },
  };
}

function timeLayout(subject, options) {
  const layout = baseLayout(options);
  const range = stepRange(subject);
  Object.assign(layout.xaxis, {
    range, ...stepTicks(range), uirevision: range.join(), minallowed: undefined, exponentformat: "none", separatethousands: true,
    title: { text: "step", font: { size: 11.5, color: colour("muted") }, standoff: 4 },
  });
  return layout;
}

/** All steps, of all runs in sight, with half a step of room; or what the user zoomed to. */
function stepRange() {
  if (state.range) return state.range;
  const spans = views().map((view) => stepSpan(view.subject)).filter(Boolean);
  if (!spans.length) return [-0.5, 0.5];
  const low = Math.min(...spans.map((each) => each[0]));
  const high = Math.max(...spans.map((each) => each[1]));
  const room = Math.max(0.5, 0.004 * (high - low));
  return [low - room, high + room];
}

/** Steps are whole numbers: of few steps, a tick at each. */
const stepTicks = ([low, high]) => (high - low <= 12 ? { tick0: 0, dtick: 1 } : {});

function ticks([low, high], log, height) {
  const most = Math.max(2, Math.floor(height / 52));
  const values = log ? logTicks(low, high, most) : linearTicks(low, high, most);
  return { tickmode: "array", tickvals: values, ticktext: values.map((value) => written(value, 6).replace(/\.0*e/, "e")) };
}

function linearTicks(low, high, most) {
  const rough = (high - low) / most;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * ([1, 2, 5, 10].find((each) => each * power >= rough) ?? 10);
  const values = [];
  for (let i = Math.ceil(low / step); i * step <= high * (1 + 1e-12) && values.length < 30; i++) {
    values.push(Number((i * step).toPrecision(12)));
  }
  return values;
}

function logTicks(low, high, most) {
  const [from, to] = [Math.log10(low), Math.log10(high)];
  if (to - from < 0.7) return linearTicks(low, high, most).filter((value) => value > 0);
  const stride = Math.max(1, Math.ceil((to - from) / most));
  const parts = to - from < 2 ? [1, 2, 5] : [1];
  const values = [];
  for (let power = Math.floor(from); power <= Math.ceil(to); power++) {
    if (((power % stride) + stride) % stride) continue;
    for (const part of parts) {
      const value = Number(`${part}e${power}`);
      if (value >= low && value <= high) values.push(value);
    }
  }
  return values;
}

/** The range of a y axis around what is in sight of `series`, lists of [x, values]; null where there is nothing. */
function valueRange(series, log, always = []) {
  const [from, to] = stepRange();
  let low = Infinity;
  let high = -Infinity;
  const seen = (value) => {
    if (!finite(value) || (log && value <= 0)) return;
    if (value < low) low = value;
    if (value > high) high = value;
  };
  for (const [x, values] of series) {
    for (let i = 0; i < values.length; i++) if (x[i] >= from && x[i] <= to) seen(values[i]);
  }
  if (low > high) return null;
  always.forEach(seen);
  if (log) {
    const room = Math.max(0.08, 0.06 * Math.log10(high / low));
    return [low / 10 ** room, high * 10 ** room];
  }
  const room = high > low ? 0.07 * (high - low) : Math.abs(high) * 0.1 || 1;
  return [low - room, high + room];
}

/** A scale of powers pays where a series spans two decades and never touches zero. */
function wantsLog(series) {
  let low = Infinity;
  let high = 0;
  for (const [, values] of series) {
    for (const value of values) {
      if (!finite(value)) continue;
      if (value <= 0) return false;
      if (value < low) low = value;
      if (value > high) high = value;
    }
  }
  return high / low > 100;
}

// ---- zoom ----

function zoomed(chart, change) {
  if (chart.kind !== "time" || change["xaxis.range[0]"] === undefined) return;
  go({ range: [change["xaxis.range[0]"], change["xaxis.range[1]"]] });
}

let zooms = 0; // part of the revision of axes that a user may have zoomed: a new number gives them up
function wholeRun() {
  zooms += 1;
  if (state.range) go({ range: null });
  else onChange(new Set(["range"])); // a heatmap may be zoomed to some rows
}

// ---- cursor, held step, tip ----

function listen(chart) {
  const { frame } = chart;
  let down = null;
  frame.addEventListener("pointermove", (event) => pointed(chart, event), true);
  frame.addEventListener("pointerleave", leave);
  frame.addEventListener("pointerdown", (event) => { down = [event.clientX, event.clientY]; }, true);
  frame.addEventListener("dblclick", wholeRun, true);
  // A press that has not moved is a click; plotly's own would need its hover, which the tip replaces.
  frame.addEventListener("pointerdown", () => {
    window.addEventListener("pointerup", (event) => {
      if (!down || Math.hypot(event.clientX - down[0], event.clientY - down[1]) > 4) return;
      pointed(chart, event);
      clicked(chart, event);
    }, { once: true });
  }, true);
}

/** Where in a chart's own units the pointer stands; null outside its axes. */
function spot(chart, event) {
  const { xaxis, yaxis } = chart.drawn ? chart.plot._fullLayout : {};
  if (!xaxis?._length) return null;
  const box = chart.plot.getBoundingClientRect();
  const x = event.clientX - box.left - xaxis._offset;
  const y = event.clientY - box.top - yaxis._offset;
  if (x < 0 || y < 0 || x > xaxis._length || y > yaxis._length) return null;
  return { x: xaxis.p2l(x), y: yaxis.p2l(y) };
}

function pointed(chart, event) {
  const place = spot(chart, event);
  const readings = place && chart.content.readings?.(place.x, place.y);
  if (!readings) return leave();
  if (chart.kind === "time") moveCursor(place.x);
  tip(readings, event);
}

function clicked(chart, event) {
  const place = spot(chart, event);
  if (!place) return;
  const picked = chart.content.pick?.(place.x, place.y);
  if (picked) go(picked);
  else if (chart.kind === "time") go({ step: Math.round(place.x) });
}

function leave() {
  byId("tip").hidden = true;
  for (const chart of charts) chart.cursor.hidden = true;
}

function moveCursor(step) {
  for (const chart of charts) if (chart.kind === "time") stand(chart, chart.cursor, step);
}

/** Stand a line at a step of a chart over time; `null` hides it. */
function stand(chart, line, step) {
  const { xaxis, yaxis } = chart.drawn && !chart.figure.hidden ? chart.plot._fullLayout : {};
  const x = xaxis?._length && step !== null ? xaxis.l2p(step) : -1;
  line.hidden = !(x >= 0 && x <= xaxis._length);
  if (line.hidden) return;
  line.style.left = `${xaxis._offset + x}px`;
  line.style.top = `${yaxis._offset}px`;
  line.style.height = `${yaxis._length}px`;
}

function placeMarks() {
  for (const chart of charts) placeMark(chart);
}

/** The held step and the chosen layer's row. Both lie over the chart: moving them draws nothing anew. */
function placeMark(chart) {
  if (chart.kind === "time") stand(chart, chart.pin, state.step);
  const rows = chart.content?.row?.(state.layer) ?? null;
  const { xaxis, yaxis } = chart.drawn && rows && !chart.figure.hidden ? chart.plot._fullLayout : {};
  chart.mark.hidden = !yaxis?._length;
  if (chart.mark.hidden) return;
  const edges = [rows[0] - 0.5, rows[1] + 0.5].map((y) => Math.max(0, Math.min(yaxis._length, yaxis.l2p(y))));
  chart.mark.style.left = `${xaxis._offset}px`;
  chart.mark.style.width = `${xaxis._length}px`;
  chart.mark.style.top = `${yaxis._offset + Math.min(...edges) - 1}px`;
  chart.mark.style.height = `${Math.abs(edges[1] - edges[0]) + 2}px`;
}

/** `readings` is {title, rows: [{colour, name, value}], note}. */
function tip(readings, event) {
  const box = byId("tip");
  box.replaceChildren(
    el("b", {}, readings.title),
    ...readings.rows.map((row) => {
      const swatch = el("i", { hidden: !row.colour });
      swatch.style.background = row.colour ?? "";
      return el("div", { class: "reading" }, swatch, el("span", {}, row.name), el("span", {}, row.value));
    }),
    ...(readings.notes ?? []).map((note) => el("div", {}, note)),
  );
  box.hidden = false;
  const left = event.clientX + 16 + box.offsetWidth > innerWidth ? event.clientX - 16 - box.offsetWidth : event.clientX + 16;
  const top = event.clientY + 16 + box.offsetHeight > innerHeight ? event.clientY - 12 - box.offsetHeight : event.clientY + 16;
  box.style.left = `${Math.max(4, left)}px`;
  box.style.top = `${Math.max(4, top)}px`;
}
