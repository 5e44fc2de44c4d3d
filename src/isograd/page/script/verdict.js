// The verdict in words: what is wrong, where, since when, the number against its limit, what to do.

const MARKS = { good: "✓", info: "i", warning: "!", error: "!" };
const LEVELS = ["info", "warning", "error"];

function showVerdict() {
  const host = byId("verdict");
  const shownRuns = runs.map((dataset) => [dataset.run, dataset.verdict, dataset.treatments, dataset.subjects.map((each) => each.name)]);
  show(host, shownRuns, () => runs.flatMap((dataset, place) => verdictOf(dataset, place)));
}

function verdictOf(dataset, place) {
  const { verdict, run } = dataset;
  if (!verdict) return [el("p", { class: "headline" }, "No verdict: the run holds no optimizer step yet.")];
  const alarming = verdict.causes.filter((cause) => cause.level !== "info");
  const worth = verdict.causes.filter((cause) => cause.level === "info");
  const worst = verdict.healthy ? "good" : !alarming.length ? "info" : LEVELS[Math.max(0, ...alarming.map((cause) => LEVELS.indexOf(cause.level)))];
  return [
    runs.length > 1 ? el("p", { class: "whose" }, runName(dataset, place)) : null,
    el("h2", { class: "headline", "data-level": worst },
      el("span", { class: "mark", "aria-hidden": "true" }, MARKS[worst]), el("span", {}, ...headline(verdict.headline))),
    run.damage ? el("p", { class: "notice" }, run.damage) : null,
    verdict.facts.length ? el("ul", { class: "story" }, verdict.facts.map((fact) => el("li", {}, fact))) : null,
    glance(dataset),
    ...alarming.map((cause, i) => causeBox(dataset, cause, i === 0)),
    worth.length ? details(`worth-${place}`, `Worth knowing, no alarm: ${listed([...new Set(worth.map((cause) => cause.name))], 4)}`,
      ...worth.map((cause) => causeBox(dataset, cause, false))) : null,
    unmeasured(verdict.unmeasured ?? [], place),
  ].filter(Boolean);
}

/** The sentences of the verdict, large; what watching cost, small behind them. */
function headline(text) {
  const at_ = text.indexOf(" Watch overhead ");
  return at_ < 0 ? [text] : [text.slice(0, at_), " ", el("small", {}, text.slice(at_ + 1))];
}

const runName = (dataset, place) => `${"AB"[place]}: ${dataset.run.script ?? ""} ${dataset.run.id ?? ""}`;

/** A handful of numbers that tell the run apart from others. */
function glance(dataset) {
  const subject = shownSubject(dataset);
  const facts = [["Steps", String(dataset.run.steps ?? "none")]];
  if (subject) {
    facts.push(["Loss, first → last", fromTo(subject.lines.loss)], ["Signal, loss → input", signalFall(subject)], ["Layers", String(subject.layers.length)]);
  }
  if (dataset.run.seconds) facts.push(["Wall time", duration(dataset.run.seconds)]);
  if (finite(dataset.run.overhead)) facts.push(["Watch overhead", percent(dataset.run.overhead)]);
  const told = facts.filter(([, value]) => value);
  return el("dl", { class: "glance" }, told.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
}

function fromTo(line) {
  const values = line ? [...line.mid].filter(finite) : [];
  if (!values.length) return line ? "never finite" : null;
  const lost = line.nonfinite.at(-1) > 0;
  return `${written(values[0])} → ${lost ? "NaN" : written(values.at(-1))}`;
}

/** How many decades the gradient loses from the layer nearest to the loss back to the first, at the last step. */
function signalFall(subject) {
  const profile = depthRows(subject);
  if (!profile || profile.map.byParameter) return null;
  const { map, rows } = profile;
  for (let bin = map.bins - 1; bin >= 0; bin--) {
    const values = rows.map((each) => at(map, each.row, bin)).filter((value) => value > 0);
    if (values.length < 2) continue;
    const decadesLost = Math.log10(values.at(-1) / values[0]);
    return Math.abs(decadesLost) < 0.05 ? "level" : `${decadesLost > 0 ? "−" : "+"}${written(Math.abs(decadesLost), 2)} decades`;
  }
  return null;
}

function duration(seconds) {
  if (seconds < 90) return `${written(seconds, 2)} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 90) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

function causeBox(dataset, cause, foremost) {
  const several = dataset.subjects.length > 1;
  const steps = cause.first_step === cause.last_step ? `step ${cause.first_step}` : `steps ${cause.first_step}–${cause.last_step}`;
  const treatment = dataset.treatments.find((each) => each.cause === cause.name);
  const first = cause.layers?.[0];
  return el("article", { class: "cause", "data-level": cause.level },
    el("header", {},
      el("h3", {}, cause.name), level(cause.level),
      el("span", { class: "where" },
        `${several ? `${cause.subject} · ` : ""}since `,
        el("button", { type: "button", class: "layer-link", onclick: () => go({ subject: cause.subject, step: cause.first_step }) }, `step ${cause.first_step}`),
        steps.startsWith("steps") ? ` to ${cause.last_step}` : "",
        first ? " · in " : "",
        first ? layerLink(cause.subject, first) : "",
        cause.layers?.length > 1 ? ` and ${counted(cause.layers.length - 1, "more layer")}` : "")),
    el("p", {}, cause.message),
    evidenceTable(cause),
    cause.symptoms?.length ? el("p", {}, `Explains: ${cause.symptoms.map((each) => `${each.name} (step ${each.first_step})`).join(", ")}.`) : null,
    foremost && treatment ? el("p", {}, treatmentLead(treatment)) : null,
    foremost && treatment ? codeBlock(treatment.code, `code of ${treatment.name}`) : null,
    foremost ? null : remediesOf(cause),
    details(`why-${cause.subject}-${cause.name}`, "Why, and how it is decided",
      cause.why ? el("div", { class: "prose" }, cause.why) : null,
      el("p", { class: "small muted" }, `Confidence ${percent(cause.confidence ?? 1)}.${cause.layers?.length > 1 ? ` Layers: ${cause.layers.join(", ")}.` : ""}`),
      codeBlock(`isograd explain ${cause.name}`, "the command that explains it")));
}

function treatmentLead(treatment) {
  return treatment.applicability === "advice" ? `What to look at: ${treatment.name}.` : `What may cure it: ${treatment.name}.`;
}

const remediesOf = (cause) => (cause.remedies?.length ? el("p", {}, `Remedies: ${cause.remedies.join(", ")}.`) : null);

function evidenceTable(cause) {
  if (!cause.evidence?.length) return null;
  const placed = cause.evidence.some((each) => each.layer);
  const rows = cause.evidence.slice(0, 6).map((each) => el("tr", {},
    el("th", { scope: "row" }, each.statistic.replaceAll("_", " ")),
    el("td", { class: "number" }, written(each.observed)),
    el("td", { class: "number" }, written(each.limit)),
    el("td", {}, each.step === null ? "" : `step ${each.step}`),
    placed ? el("td", { class: "mono" }, each.layer ?? "") : null));
  return table(`Evidence for ${cause.name}`,
    ["Measured", { name: "Observed", number: true }, { name: "Limit", number: true }, "At", ...(placed ? ["In"] : [])], rows, { class: "evidence" });
}

function unmeasured(entries, place) {
  if (!entries.length) return null;
  const rules = new Set(entries.flatMap((each) => each.rules));
  return details(`unmeasured-${place}`, `Could not look: ${counted(rules.size, "rule")}`,
    el("ul", { class: "story" }, entries.map((each) =>
      el("li", {}, `${each.missing}: ${each.why} Silent: ${each.rules.join(", ")}.`))));
}
