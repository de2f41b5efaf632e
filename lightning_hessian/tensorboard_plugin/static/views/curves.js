// Curvature over training: one derived quantity as lines over steps, several runs on one chart.

import { faded, lineColour } from "../colours.js";
import { choice, el, panel } from "../dom.js";
import { METRICS, metric } from "../metrics.js";
import { short, spread } from "../numbers.js";
import { columnTitle } from "../state.js";

const DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"];
const END_OF_SPECTRUM = { lambda_max: "first", lambda_min: "last" };

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
    const groups = await Promise.all(entries.map((entry) => curvesOf(entry, several)));
    if (isStale()) return;
    const drawn = groups.flat();
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

  async function curvesOf(entry, several) {
    const answer = await source.series(entry.run, entry.tag);
    if (state.lines === "classes") {
      return entry.columns.map((name, column) => ({
        title: [columnTitle(entry, name), several && entry.label].filter(Boolean).join(", "),
        colour: lineColour(column),
        dash: DASHES[entry.index % DASHES.length],
        points: overSamples(answer, column),
        band: false,
      }));
    }
    const column = entry.columns.indexOf(state.column);
    if (column < 0) return [];
    const alone = state.lines === "sample";
    if (alone && state.sample >= entry.num_samples) return [];
    const points = alone ? await ofSample(entry, answer, column) : overSamples(answer, column);
    return [{ title: entry.label, colour: lineColour(entry.index), dash: "solid", points, band: !alone }];
  }

  // Mean and percentiles at every step; the error is the mean standard error, as in the scalars.
  function overSamples({ arrays }, column) {
    const name = state.metric;
    const steps = arrays.steps.data;
    const errors = arrays[`${name}_error`];
    const open = arrays.unconverged;
    return Array.from(steps, (step, s) => {
      const about = spread(samplesOf(arrays[name], s, column));
      const error = errors ? spread(samplesOf(errors, s, column)).mean : 0;
      const missed = open ? samplesOf(open, s, column).filter((count) => count > 0).length : 0;
      return { step, value: about.mean, low: about.low, high: about.high, missing: about.missing, error, missed };
    });
  }

  async function ofSample(entry, { arrays }, column) {
    const name = state.metric;
    const { sample } = state;
    const end = END_OF_SPECTRUM[name];
    const spectra = await source.spectra(entry.run, entry.tag, sample, column);
    return Array.from(arrays.steps.data, (step, s) => {
      const value = samplesOf(arrays[name], s, column)[sample];
      const own = end ? endOf(spectra.arrays, s, end) : null;
      const error = own
        ? own.residual
        : arrays[`${name}_error`]
          ? samplesOf(arrays[`${name}_error`], s, column)[sample]
          : 0;
      return { step, value, error, missing: Number.isFinite(value) ? 0 : 1, missed: own && !own.converged ? 1 : 0 };
    });
  }

  const key = () => JSON.stringify([state.runs, state.metric, state.lines, state.column, state.sample, state.step]);
  return { ...frame, key, update };
}

// The values of all samples at one step and class column, of an array [S, N, K].
function samplesOf({ shape: [, samples, columns], data }, step, column) {
  return Array.from({ length: samples }, (_, sample) => data[(step * samples + sample) * columns + column]);
}

// The listed eigenvalue at one end of the spectrum: its residual, and whether it converged.
function endOf({ eigenvalues, residuals, converged }, step, end) {
  const width = eigenvalues.shape[1];
  const places = Array.from({ length: width }, (_, i) => step * width + i).filter((i) =>
    Number.isFinite(eigenvalues.data[i]),
  );
  const place = end === "first" ? places[0] : places.at(-1);
  return { residual: residuals.data[place] ?? 0, converged: Boolean(converged.data[place]) };
}

function traces({ title, colour, dash, points, band }) {
  const x = points.map(({ step }) => step);
  const y = points.map(({ value }) => (Number.isFinite(value) ? value : null));
  const told = points.map(({ value, low, high, error, missed }) =>
    [
      short(value) + (error > 0 ? ` ± ${short(error, 2)}` : ""),
      band && `10 to 90 %: ${short(low)} to ${short(high)}`,
      missed > 0 && "not converged",
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
    marker: { color: colour, size: 6, symbol: points.map(({ missed }) => (missed > 0 ? "x-open" : "circle")) },
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
  const missed = all.filter((point) => point.missed > 0).length;
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
