// Curvature over training: one derived quantity as lines over steps, several runs on one chart.

import { faded, lineColour } from "../colours.js";
import { choice, el, panel } from "../dom.js";
import { METRICS, metric } from "../metrics.js";
import { short, spread } from "../numbers.js";
import { columnTitle } from "../state.js";

const DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"];

// Which ends of the spectrum a quantity is made of: where one has not converged, neither has the quantity.
const BOTH = ["lambda_max", "lambda_min"];
const OPEN = {
  lambda_max: ["lambda_max"],
  lambda_min: ["lambda_min"],
  spectral_norm: BOTH,
  normalized_curvature: BOTH,
  linear_radius: BOTH,
  gradient_alignment: BOTH,
  top_eigenvector_cosine: BOTH,
  top_subspace_overlap: BOTH,
};

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
    const { entries, metric: name } = state;
    chosen.show(
      METRICS.map(({ name: each, title }) => [each, title]),
      name,
    );
    lines.show(
      [
        ["spread", "mean over samples, band: 10th to 90th percentile"],
        ["sample", `sample ${state.sample} alone`],
        ["classes", "mean over samples, every class"],
      ],
      state.lines,
    );
    meaning.textContent = `${metric(name).title}: ${metric(name).meaning}.`;
    const several = entries.length > 1;
    const series = await Promise.all(entries.map((entry) => source.series(entry.run, entry.tag)));
    if (isStale()) return;
    const drawn = entries.flatMap((entry, index) => curvesOf(entry, series[index], several));
    if (!drawn.length) {
      frame.empty(`No chosen run has the class column ${state.column}.`);
      return;
    }
    frame.clear();
    frame.tell(notes(drawn));
    await charts.draw(frame.body, drawn.flatMap(traces), {
      height: 340,
      xaxis: { title: { text: "step" } },
      yaxis: { title: { text: metric(name).title }, exponentformat: "power", rangemode: "normal" },
      showlegend: drawn.length > 1,
      legend: { orientation: "h", y: -0.22 },
      shapes: [marker(state.step, charts.colour("accent"))],
      hovermode: "closest",
    });
    charts.onClick(frame.body, ({ points }) => goTo(points[0].x));
  }

  function goTo(step) {
    const index = state.steps.indexOf(step);
    if (index >= 0) state.setStepIndex(index);
  }

  function curvesOf(entry, answer, several) {
    const samples = Array.from({ length: entry.num_samples }, (_, sample) => sample);
    if (state.lines === "classes") {
      return entry.columns.map((name, column) => ({
        title: [columnTitle(entry, name), several && entry.label].filter(Boolean).join(", "),
        colour: lineColour(column),
        dash: DASHES[entry.index % DASHES.length],
        points: pointsOf(answer, column, samples),
        band: false,
      }));
    }
    const column = entry.columns.indexOf(state.column);
    if (column < 0) return [];
    const alone = state.lines === "sample";
    if (alone && state.sample >= entry.num_samples) return [];
    const points = pointsOf(answer, column, alone ? [state.sample] : samples);
    return [{ title: entry.label, colour: lineColour(entry.index), dash: "solid", points, band: !alone }];
  }

  // At every step the mean and percentiles over `samples`; the error is their mean error, as in the scalars.
  function pointsOf({ arrays }, column, samples) {
    const name = state.metric;
    const at = (array, step) => (array ? samples.map((sample) => valueOf(array, step, sample, column)) : []);
    const open = (OPEN[name] ?? []).map((end) => arrays[`${end}_open`]);
    return Array.from(arrays.steps.data, (step, s) => {
      const { mean: value, low, high, missing } = spread(at(arrays[name], s));
      const error = spread(at(arrays[`${name}_error`], s)).mean;
      const missed = open.some((array) => at(array, s).includes(1));
      return { step, value, low, high, missing, error, missed };
    });
  }

  const key = () => JSON.stringify([state.runs, state.metric, state.lines, state.column, state.sample, state.step]);
  return { ...frame, key, update };
}

const valueOf = ({ shape: [, samples, columns], data }, step, sample, column) =>
  data[(step * samples + sample) * columns + column];

function traces({ title, colour, dash, points, band }) {
  const x = points.map(({ step }) => step);
  const y = points.map(({ value }) => (Number.isFinite(value) ? value : null));
  const told = points.map(({ value, low, high, error, missed }) =>
    [
      short(value) + (error > 0 ? ` ± ${short(error, 2)}` : ""),
      band && `10 to 90 %: ${short(low)} to ${short(high)}`,
      missed && "not converged",
    ]
      .filter(Boolean)
      .join("<br>"),
  );
  const line = {
    x,
    y,
    text: told,
    name: title,
    mode: "lines+markers",
    line: { color: colour, dash, width: 2 },
    marker: {
      color: colour,
      size: points.map(({ missed }) => (missed ? 12 : 6)),
      symbol: points.map(({ missed }) => (missed ? "x" : "circle")),
    },
    error_y: {
      type: "data",
      array: points.map(({ error }) => error || 0),
      visible: points.some(({ error }) => error > 0),
      color: colour,
      thickness: 1,
    },
    hovertemplate: "step %{x}: %{text}<extra>%{fullData.name}</extra>",
  };
  if (!band) return [line];
  const edge = { x, mode: "lines", line: { width: 0 }, hoverinfo: "skip", showlegend: false };
  return [
    { ...edge, y: points.map(({ low }) => low) },
    { ...edge, y: points.map(({ high }) => high), fill: "tonexty", fillcolor: faded(colour, 0.18) },
    line,
  ];
}

function notes(drawn) {
  const all = drawn.flatMap(({ points }) => points);
  const missing = all.filter((point) => point.missing > 0).length;
  const missed = all.filter((point) => point.missed).length;
  return [
    all.some(({ error }) => error > 0) && "Bars: residuals of eigenvalues or standard errors of estimates.",
    missed && `Crosses: ${missed} points with eigenvalues that have not converged.`,
    missing && `At ${missing} points samples whose value is infinite or undefined are left out.`,
  ]
    .filter(Boolean)
    .join(" ");
}

// The vertical line at the step that is shown.
export const marker = (step, colour) => ({
  type: "line",
  x0: step,
  x1: step,
  y0: 0,
  y1: 1,
  yref: "paper",
  line: { color: colour, width: 1.5, dash: "dot" },
});
