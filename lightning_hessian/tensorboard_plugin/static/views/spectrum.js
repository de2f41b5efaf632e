// The spectrum of one sample and class at one step: listed eigenvalues with residuals, and the histogram of all.

import { panel } from "../dom.js";
import { joined, percent, short } from "../numbers.js";
import { axisFor, counted, countTicks, exactnessAt, histogramAt, listed } from "../spectra.js";
import { classTitle, outputWord } from "../state.js";

export function spectrum({ state, source, charts }) {
  const frame = panel(
    "spectrum",
    "Spectrum at this step",
    "Eigenvalues on an axis that is logarithmic on both sides of zero. Points: the listed eigenvalues, the largest |λ| at the top; bars: their residuals ‖Hv − λv‖. Below: the histogram of all eigenvalues.",
  );

  async function update(isStale) {
    const { entry, sample, classId } = state;
    const spectra = await source.spectra(entry.run, entry.tag, sample, classId);
    if (isStale()) return;
    const index = spectra.arrays.steps.data.indexOf(state.step);
    if (index < 0) {
      frame.empty(`There is no spectrum at step ${state.step}.`);
      return;
    }
    if (!spectra.arrays.valid.data[index]) {
      frame.empty(`The Hessian of this sample and ${outputWord(entry)} is not valid at step ${state.step}: the diagnosis below says why.`);
      return;
    }
    const axis = axisFor(spectra);
    const pairs = listed(spectra, index).sort((a, b) => Math.abs(b.value) - Math.abs(a.value));
    const bars = histogramAt(spectra, index, axis);
    const exactness = exactnessAt(spectra, index);
    frame.clear();
    frame.describe(inWords(entry, state, spectra.arrays, index, pairs, bars, exactness));
    const settled = pairs.filter(({ converged }) => converged);
    const traces = [points(settled, "converged", axis, charts)];
    const open = pairs.filter(({ converged }) => !converged);
    if (open.length) traces.push(points(open, "not converged", axis, charts));
    if (bars) traces.push(histogram(bars, exactness, charts));
    await charts.draw(frame.body, traces, {
      height: 380,
      xaxis: {
        title: { text: `λ (${entry.target} per input unit²)` },
        tickvals: axis.ticks.values,
        ticktext: axis.ticks.text,
        range: [-axis.reach, axis.reach],
        anchor: "y2",
        zeroline: true,
      },
      yaxis: {
        title: { text: "rank by |λ|" },
        autorange: "reversed",
        domain: bars ? [0.4, 1] : [0, 1],
        rangemode: "tozero",
        zeroline: false,
      },
      yaxis2: { title: { text: exactness.isEstimate ? "count (estimated)" : "count" }, domain: [0, 0.34], ...countTicks(bars), zeroline: false },
      showlegend: open.length > 0,
      legend: { orientation: "h", y: 1.12 },
      bargap: 0,
      hovermode: "closest",
    });
  }

  const key = () => JSON.stringify([state.run, state.sample, state.classId, state.step, state.steps.length]);
  return { ...frame, key, update };
}

// What an eigenvalue is called, and the name of its color.
const signOf = (value, residual) => (Math.abs(value) <= (residual || 0) ? "muted" : value < 0 ? "negative" : "positive");

function points(pairs, name, axis, charts) {
  const away = ({ value, residual }, sign) => Math.abs(axis.position(value + sign * (residual || 0)) - axis.position(value));
  const converged = name === "converged";
  return {
    name,
    mode: "markers",
    x: pairs.map(({ value }) => axis.position(value)),
    y: pairs.map((pair) => pair.rank),
    text: pairs.map(
      ({ value, residual }) => `λ = ${short(value, 5)} ± ${short(residual, 1)}${converged ? "" : " (not converged)"}`,
    ),
    hovertemplate: "%{text}<extra></extra>",
    marker: {
      symbol: converged ? "circle" : "x",
      size: converged ? 7 : 10,
      color: converged
        ? pairs.map(({ value, residual }) => charts.color(signOf(value, residual)))
        : charts.color("warning"),
    },
    error_x: {
      type: "data",
      symmetric: false,
      array: pairs.map((pair) => away(pair, 1)),
      arrayminus: pairs.map((pair) => away(pair, -1)),
      color: charts.color("muted"),
      thickness: 1,
    },
  };
}

function histogram(bars, { isEstimate }, charts) {
  const centers = bars.map(({ left, right }) => (left + right) / 2);
  return {
    type: "bar",
    yaxis: "y2",
    showlegend: false,
    x: centers,
    y: bars.map(({ count }) => counted(count)),
    width: bars.map(({ left, right }) => right - left),
    marker: {
      color: centers.map((center) => charts.color(center < 0 ? "negative" : center > 0 ? "positive" : "muted")),
    },
    text: bars.map(({ count }) => `${short(count)} eigenvalues${isEstimate ? " (estimated)" : ""}`),
    textposition: "none",
    hovertemplate: "%{text}<extra></extra>",
  };
}

function inWords(entry, { sample, classId }, arrays, index, pairs, bars, { words }) {
  const of = `${entry.target} of ${classTitle(entry, classId)}, sample ${sample}`;
  if (!pairs.length) return `${of}: no eigenvalues are listed; the Hessian is zero or was not measured.`;
  const [listed, converged, residual, negative] = ["num_listed", "num_converged", "largest_residual", "negative_share"].map(
    (name) => arrays[name].data[index],
  );
  const values = pairs.map(({ value }) => value);
  if (!values.some(Boolean)) return `${of}: the Hessian is exactly zero, and so is every eigenvalue (gray).`;
  return joined([
    `${of}: ${listed} of ${entry.num_inputs} eigenvalues are listed, from ${short(Math.min(...values))} to ${short(Math.max(...values))}.`,
    Number.isFinite(negative) && `${percent(negative)} of their Σ|λ| is negative.`,
    converged < listed
      ? `${listed - converged} have NOT converged.`
      : `All have converged, with residuals of at most ${short(residual, 1)}.`,
    bars && words && `Counts of the histogram are ${words}.`,
    !bars && "There is no histogram: the eigenvalues between the ends were not estimated (density_vectors=0).",
  ]);
}
