// Treatments: what was tried and measured, and what is proposed with the code to paste.

const OUTCOMES = { resolved: "good", improved: "good", "no-effect": "info", worse: "error", inconclusive: "warning" };
let chosenTrial = null; // index; null: the best, or the first

function trials() {
  const fix = runs[0]?.fix;
  return fix?.trials ?? [];
}

const trialName = (trial) => [trial.treatment ?? trial.name ?? "treatment"].flat().join(" + ");

function shownTrial() {
  const all = trials();
  return all[chosenTrial ?? runs[0].fix.best ?? 0] ?? all[0];
}

function showTreatments() {
  const host = byId("treatments").querySelector(".words");
  const fix = runs[0]?.fix ?? null;
  const told = fix && { best: fix.best, trials: fix.trials.map((trial) => ({ ...trial, curves: null })), chosenTrial };
  show(host, told ?? "none", () => (fix ? trialWords(fix) : [
    el("p", { class: "absent" }, "None was tried on this program. This command tries candidates beside the untreated program, on the same seeds:"),
    codeBlock(fixCommand(), "the command that tries treatments"),
  ]));
}

const fixCommand = () => `isograd fix ${runs[0]?.run.meta?.command ?? runs[0]?.run.script ?? "SCRIPT"}`;

function trialWords(fix) {
  const best = fix.best === null || fix.best === undefined ? null : fix.trials[fix.best];
  const lead = best ? `Best of ${counted(fix.trials.length, "treatment")}: ${trialName(best)}, ${best.outcome}.`
    : `${counted(fix.trials.length, "treatment")} tried; none was better than doing nothing.`;
  const rows = fix.trials.map((trial, i) => el("tr", { "aria-current": trial === shownTrial() ? "true" : null },
    el("th", { scope: "row" }, el("button", { type: "button", class: "layer-link", onclick: () => { chosenTrial = i; onChange(new Set(["trial"])); } }, trialName(trial))),
    el("td", {}, el("span", { class: "level", "data-level": OUTCOMES[trial.outcome] ?? "info" }, trial.outcome ?? "")),
    el("td", { class: "number" }, effectWords(trial.effect)),
    el("td", { class: "number" }, finite(trial.pairs) ? String(trial.pairs) : ""),
    el("td", { class: "number" }, finite(trial.seconds) ? duration(trial.seconds) : "")));
  return [
    el("p", {}, lead),
    scrolling(table("Effect: what the treatment gains, as a share of the progress made; pairs of equal seeds, with a 95 % interval. Above zero is better.",
      ["Treatment", "Outcome", { name: "Effect", number: true }, { name: "Pairs", number: true }, { name: "Time", number: true }], rows), "Treatments tried"),
    trialEnd(shownTrial()),
    shownTrial()?.code ? codeBlock(shownTrial().code, `code of ${trialName(shownTrial())}`) : null,
  ].filter(Boolean);
}

/** What else is known of the chosen one: `resolved …; brought …`. */
function trialEnd(trial) {
  const told = [
    trial?.resolved?.length ? `resolved ${trial.resolved.join(", ")}` : "",
    trial?.remaining?.length ? `left ${trial.remaining.join(", ")}` : "",
    trial?.introduced?.length ? `brought ${trial.introduced.join(", ")}` : "",
    trial?.why ?? "",
  ].filter(Boolean);
  return told.length ? el("p", {}, `${trialName(trial)}: ${told.join("; ").replace(/\.$/, "")}.`) : null;
}

function effectWords(effect) {
  if (!effect || !finite(effect.value)) return "";
  return finite(effect.low) && finite(effect.high)
    ? `${written(effect.value)} [${written(effect.low)}, ${written(effect.high)}]` : written(effect.value);
}

/** Effects with their intervals, one line each, against zero. */
const effectChart = {
  id: "effects", section: "treatments", kind: "plain", on: ["trial"],
  build() {
    const told = trials().filter((trial) => finite(trial.effect?.value));
    if (!told.length) return { absent: "" };
    const height = 74 + 26 * told.length;
    const y = told.map((_, i) => i);
    const bounds = told.flatMap(({ effect }) => [effect.value, effect.low, effect.high, 0]).filter(finite);
    const low = Math.min(...bounds);
    const high = Math.max(...bounds);
    const room = 0.06 * (high - low || 1);
    const longest = Math.max(...told.map((trial) => trialName(trial).length));
    const left = narrow() ? 110 : Math.min(330, 20 + 6.5 * longest);
    const fits = Math.floor((left - 14) / 6.2);
    const layout = baseLayout({ height, margin: { l: left } });
    Object.assign(layout.xaxis, { range: [low - room, high + room], fixedrange: true, tickmode: "array", ...ticks([low - room, high + room], false, 260) });
    layout.xaxis.title = { text: "effect: share of the progress made (right is better)", font: { size: 11.5, color: colour("muted") }, standoff: 4 };
    Object.assign(layout.yaxis, {
      range: [told.length - 0.5, -0.5], showticklabels: true, tickmode: "array", tickvals: y, showgrid: false,
      ticktext: told.map((trial) => plotText(trialName(trial).length > fits ? `${trialName(trial).slice(0, fits - 1)}…` : trialName(trial))),
    });
    layout.shapes = [{ type: "line", x0: 0, x1: 0, yref: "paper", y0: 0, y1: 1, line: { color: colour("muted"), width: 1.2, dash: "dash" } }];
    // An interval without an end (a single pair) has no whisker.
    const reach = (side) => told.map(({ effect }) => (finite(effect[side]) ? Math.abs(effect[side] - effect.value) : 0));
    return {
      height, layout,
      traces: [{
        type: "scatter", mode: "markers", x: told.map((trial) => trial.effect.value), y,
        marker: { size: 9, color: colour("series-1") },
        error_x: { type: "data", symmetric: false, array: reach("high"), arrayminus: reach("low"), color: colour("series-1"), thickness: 1.6, width: 4 },
      }],
      words: `Effect of each treatment, as a share of the progress made: ${told.map((trial) => `${trialName(trial)} ${effectWords(trial.effect)}`).join("; ")}.`,
      readings(_, at_) {
        const trial = told[Math.round(at_)];
        return trial ? { title: trialName(trial), rows: [{ name: trial.outcome ?? "effect", value: effectWords(trial.effect), colour: colour("series-1") }] } : null;
      },
    };
  },
};

/** Loss curves of the chosen trial, each seed with and without. */
const curveChart = {
  id: "curves", section: "treatments", kind: "plain", on: ["trial"],
  build() {
    const trial = runs[0]?.fix ? shownTrial() : null;
    const curves = trial?.curves;
    if (!curves?.steps) return { absent: trial ? "No loss curves were kept of this treatment." : "" };
    const steps = decoded(curves.steps);
    const arms = [["untreated", curves.baseline, "series-plain"], ["treated", curves.treated, "series-1"]]
      .map(([name, seeds, color]) => ({ name, seeds: (seeds ?? []).map(decoded), color: colour(color) }));
    const pairs = arms.flatMap((arm) => arm.seeds.map((values) => [steps, values]));
    const powers = wantsLog(pairs);
    const everything = span(pairs.flatMap(([, values]) => [...values]), (value) => !powers || value > 0);
    if (!everything) return { absent: "The loss of this treatment was never finite." };
    const room = powers ? 1.1 : 0.05 * (everything[1] - everything[0] || 1);
    const range = powers ? [everything[0] / room, everything[1] * room] : [everything[0] - room, everything[1] + room];
    const height = 260;
    const layout = baseLayout({ height, log: powers, legend: true, range, unit: "loss", margin: { l: 68 } });
    layout.xaxis.title = { text: "step", font: { size: 11.5, color: colour("muted") }, standoff: 4 };
    const ends = (arm) => arm.seeds.map((values) => written([...values].filter(finite).at(-1), 4)).join(", ");
    return {
      height, layout,
      caption: [el("span", { class: "title" }, `${trialName(trial)}: loss of each seed, with and without`)],
      traces: arms.flatMap((arm) => arm.seeds.map((values, seed) => ({
        type: "scatter", mode: "lines", name: arm.name, legendgroup: arm.name, showlegend: seed === 0, x: steps, y: values,
        line: { color: arm.color, width: 1.7 }, opacity: 0.85,
      }))),
      words: `Loss with and without ${trialName(trial)}, a line for each seed. ${arms.map((arm) => `${arm.name} ends at ${ends(arm)}`).join("; ")}.`,
      readings(x) {
        const bin = nearest(steps, x);
        return bin < 0 ? null : {
          title: `step ${steps[bin]}`,
          rows: arms.flatMap((arm) => arm.seeds.map((values, seed) => ({ colour: arm.color, name: `${arm.name}, seed ${seed + 1}`, value: written(values[bin], 4) }))),
        };
      },
    };
  },
};

const CONSENT = { automatic: "isograd fix can try it", "opt-in": "tried only where it is asked for", advice: "for you to do" };

function showProposals() {
  const host = byId("proposals").querySelector(".words");
  const proposals = runs[0]?.treatments ?? [];
  show(host, proposals, () => {
    if (!proposals.length) {
      return [el("p", { class: "absent" }, runs[0]?.verdict?.healthy ? "Nothing to treat: no fault was found." : "isograd knows no treatment for these causes.")];
    }
    const box = (treatment, i) => el("article", {},
      el("h3", {}, `${i + 1}. ${treatment.name}`),
      el("p", { class: "small muted" }, `For ${treatment.cause} · ${CONSENT[treatment.applicability] ?? treatment.applicability}`),
      codeBlock(treatment.code, `code of ${treatment.name}`));
    const rest = proposals.slice(3);
    return [
      ...proposals.slice(0, 3).map(box),
      ...(rest.length ? [details("proposals", `${counted(rest.length, "more proposal")}`, ...rest.map((treatment, i) => box(treatment, i + 3)))] : []),
    ];
  });
}
