// Curvature over training: one metric as lines over steps, several runs in one chart.

import { entryOf } from "../api.js";
import { faded, lineColor } from "../colors.js";
import { choice, el, panel } from "../dom.js";
import { joined, quantile, short } from "../numbers.js";
import { classTitle, outputWord } from "../state.js";

const BANDS = [
  [0, 1, 0.1],
  [0.05, 0.95, 0.18],
  [0.25, 0.75, 0.3],
]; // shares of the samples below and above, and how strongly the band between is drawn
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"];

export function curves({ state, source, charts }) {
  const frame = panel(
    "curves",
    "Curvature over training",
    "One number per sample and step. Click a point to go to its step.",
  );
  const chosen = choice("metric-select", "show", (name) => state.set({ metric: name }));
  const lines = choice("lines-select", "as", (name) => state.set({ lines: name }));
  const meaning = el("p", { className: "words" });
  frame.head.append(el("div", { className: "row" }, chosen.element, lines.element), meaning);

  async function update(isStale) {
    const { entries, metric } = state;
    chosen.show(
      state.metrics.map(({ name, title }) => [name, title]),
      metric.name,
    );
    lines.show(
      [
        ["spread", "mean over samples, band: 10th to 90th percentile"],
        ["quantiles", "median over samples, bands: quartiles, 5th to 95th percentile, all"],
        ["sample", `sample ${state.sample} alone`],
        ["classes", `mean over samples, every ${outputWord(state.entry)}`],
      ],
      state.lines,
    );
    const unit = metric.unit.replace("target", state.entry.target);
    const formula = joined([metric.formula, unit && `in ${unit}`], ", ");
    meaning.textContent = `${metric.title}${formula && ` (${formula})`}: ${metric.meaning}.`;
    const several = entries.length > 1;
    const series = await Promise.all(entries.map((entry) => source.series(entry.run, entry.tag)));
    if (isStale()) return;
    const lineups = entries.map((entry, index) => curvesOf(entry, series[index], several));
    const drawn = lineups.flat();
    if (!drawn.length) {
      frame.empty(`No selected run has ${classTitle(state.entry, state.classId)}.`);
      return;
    }
    frame.clear();
    const absent = entries.filter((_, index) => !lineups[index].length);
    frame.describe(joined([aboutRuns(entries, absent), notes(drawn)]));
    await charts.drawOverSteps(frame.body, drawn.flatMap(traces), state, {
      height: 340,
      yaxis: { title: { text: metric.title }, exponentformat: "power", rangemode: "normal" },
      showlegend: drawn.length > 1,
      legend: { orientation: "h", y: -0.22 },
      hovermode: "closest",
    });
  }

  function curvesOf(entry, { arrays }, several) {
    if (state.lines === "classes") {
      return entry.class_ids.map((classId, index) => ({
        title: joined([classTitle(entry, classId), several && entry.label], ", "),
        color: lineColor(index),
        dash: DASHES[entry.index % DASHES.length],
        points: means(arrays, index),
        bands: [],
      }));
    }
    const index = entry.class_ids.indexOf(state.classId);
    const single = state.lines === "sample";
    if (index < 0 || (single && state.sample >= entry.num_samples)) return [];
    const shown = { title: entry.label, color: lineColor(entry.index), dash: "solid" };
    if (single) return [{ ...shown, points: valuesOf(arrays, state.sample, index), bands: [] }];
    if (state.lines === "quantiles") return [{ ...shown, ...quantiles(arrays, index) }];
    const points = means(arrays, index);
    const [low, high] = ["low", "high"].map((name) => points.map((point) => point[name]));
    return [{ ...shown, points, bands: [{ low, high, words: "10 to 90 %", strength: 0.18 }] }];
  }

  // The mean and percentiles over samples at every step; the error is the mean error, as in the scalars.
  function means(arrays, classIndex) {
    const name = state.metric.name;
    const at = (suffix, step) => entryOf(arrays[`${name}_${suffix}`], step, classIndex);
    return Array.from(arrays.steps.data, (step, s) => ({
      step,
      value: at("mean", s),
      low: at("p10", s),
      high: at("p90", s),
      missing: at("num_finite", s) < arrays[name].shape[1],
      error: at("error_mean", s),
      isOpen: at("all_converged", s) === 0,
    }));
  }

  // The median over the samples with finite values, and bands between quantiles, at every step.
  function quantiles(arrays, classIndex) {
    const array = arrays[state.metric.name];
    const sorted = Array.from(arrays.steps.data, (_, s) =>
      Array.from({ length: array.shape[1] }, (_, n) => entryOf(array, s, n, classIndex))
        .filter(Number.isFinite)
        .sort((a, b) => a - b),
    );
    const at = (share) => sorted.map((values) => (values.length ? quantile(values, share) : NaN));
    const median = at(0.5);
    const points = Array.from(arrays.steps.data, (step, s) => ({
      step,
      value: median[s],
      missing: sorted[s].length < array.shape[1],
      isOpen: entryOf(arrays[`${state.metric.name}_all_converged`], s, classIndex) === 0,
    }));
    const bands = BANDS.map(([below, above, strength]) => ({
      low: at(below),
      high: at(above),
      words: below ? `${100 * below} to ${100 * above} %` : "all",
      strength,
    }));
    return { points, bands };
  }

  function valuesOf(arrays, sample, classIndex) {
    const name = state.metric.name;
    const at = (array, step) => entryOf(array, step, sample, classIndex);
    return Array.from(arrays.steps.data, (step, s) => {
      const value = at(arrays[name], s);
      const error = at(arrays[`${name}_error`], s);
      const isOpen = at(arrays[`${name}_converged`], s) === 0;
      return { step, value, error, isOpen, missing: !Number.isFinite(value) };
    });
  }

  const key = () => JSON.stringify([state.runs, state.metric, state.lines, state.classId, state.sample, state.step]);
  return { ...frame, key, update };
}

function traces({ title, color, dash, points, bands }) {
  const x = points.map(({ step }) => step);
  const orGap = (value) => (Number.isFinite(value) ? value : null);
  const text = points.map(({ value, error, isOpen }, s) => {
    const middle = short(value) + (error > 0 ? ` ± ${short(error, 2)}` : "");
    const spread = bands.map(({ words, low, high }) => `${words}: ${short(low[s])} to ${short(high[s])}`);
    return joined([middle, ...spread, isOpen && "not converged"], "<br>");
  });
  const line = {
    x,
    y: points.map(({ value }) => orGap(value)),
    text,
    name: title,
    mode: "lines+markers",
    line: { color, dash, width: 2 },
    marker: {
      color,
      size: points.map(({ isOpen }) => (isOpen ? 12 : 6)),
      symbol: points.map(({ isOpen }) => (isOpen ? "x" : "circle")),
    },
    error_y: {
      type: "data",
      array: points.map(({ error }) => error || 0),
      visible: points.some(({ error }) => error > 0),
      color,
      thickness: 1,
    },
    hovertemplate: "step %{x}: %{text}<extra>%{fullData.name}</extra>",
  };
  const edge = { x, mode: "lines", line: { width: 0 }, hoverinfo: "skip", showlegend: false };
  const filled = bands.flatMap(({ low, high, strength }) => [
    { ...edge, y: low.map(orGap) },
    { ...edge, y: high.map(orGap), fill: "tonexty", fillcolor: faded(color, strength) },
  ]);
  return [...filled, line];
}

// Which selected runs are missing, and whether those drawn measure different things.
function aboutRuns(entries, absent) {
  const present = entries.filter((entry) => !absent.includes(entry));
  const targets = [...new Set(present.map(({ target }) => target))];
  const labels = absent.map(({ label }) => label).join(", ");
  return joined([
    absent.length && `Not drawn, since the ${outputWord(absent[0])} or sample was not measured there: ${labels}.`,
    targets.length > 1 && `The runs measure different targets (${targets.join(", ")}): their values do not compare.`,
  ]);
}

function notes(drawn) {
  const all = drawn.flatMap(({ points }) => points);
  const missing = all.filter((point) => point.missing).length;
  const open = all.filter(({ isOpen }) => isOpen).length;
  return joined([
    all.some(({ error }) => error > 0) && "Bars: residuals of eigenvalues or standard errors of estimates.",
    open && `Crosses: ${open} points depend on eigenvalues that have not converged.`,
    missing && `At ${missing} points, samples whose value is infinite or undefined, or whose Hessian is not valid, are left out.`,
  ]);
}
