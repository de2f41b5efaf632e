// The spectrum over training: eigenvalue × step, colored by how many eigenvalues lie there.

import { panel } from "../dom.js";
import { short } from "../numbers.js";
import { axisFor, counted, countTicks, exactnessAt, histogramAt, listed } from "../spectra.js";
import { outputWord } from "../state.js";

export function evolution({ state, source, charts }) {
  const frame = panel(
    "evolution",
    "Spectrum over training",
    "Each column is the histogram at one step: the darker, the more eigenvalues. The dotted line marks the step shown; click to go to another.",
  );

  async function update(isStale) {
    const { entry, sample, classId } = state;
    const spectra = await source.spectra(entry.run, entry.tag, sample, classId);
    if (isStale()) return;
    if (!spectra.arrays.valid.data.some(Boolean)) {
      frame.empty(`The Hessian of this sample and ${outputWord(entry)} is not valid at any step: the diagnosis below says why.`);
      return;
    }
    const steps = Array.from(spectra.arrays.steps.data);
    const axis = axisFor(spectra);
    const bars = steps.map((_, index) => histogramAt(spectra, index, axis));
    const known = bars.filter(Boolean);
    const exactness = steps.map((_, index) => exactnessAt(spectra, index));
    frame.clear();
    frame.describe(
      known.length
        ? `Colors count eigenvalues on a logarithmic scale${howExact(exactness)}; points are the largest and smallest listed ones.`
        : "There are no histograms (density_vectors=0): the lines are the listed eigenvalues. Crosses mark those that have not converged.",
    );
    const traces = known.length
      ? [image(steps, bars, exactness, known[0], charts), ...ends(spectra, steps, axis, charts)]
      : ranks(spectra, steps, axis, charts);
    await charts.drawOverSteps(frame.body, traces, state, {
      height: 380,
      yaxis: {
        title: { text: "λ", standoff: 14 },
        tickvals: axis.ticks.values,
        ticktext: axis.ticks.text,
        range: [-axis.reach, axis.reach],
      },
      showlegend: false,
    });
  }

  const key = () => JSON.stringify([state.run, state.sample, state.classId, state.step, state.steps]);
  return { ...frame, key, update };
}

function howExact(exactness) {
  const words = [...new Set(exactness.filter(({ isEstimate }) => isEstimate).map(({ words }) => words))];
  return words.length ? ` (${words.join(", ")}${exactness.every(({ isEstimate }) => isEstimate) ? "" : " at some steps"})` : "";
}

function image(steps, bars, exactness, some, charts) {
  const describe = ({ count }, { isEstimate }) => (isEstimate ? `${short(count)} (estimated)` : short(count));
  const most = [{ count: Math.max(...bars.flatMap((each) => each ?? []).map(({ count }) => count)) }];
  return {
    type: "heatmap",
    x: steps,
    y: [...some.map(({ left }) => left), some.at(-1).right],
    z: some.map((_, bin) => bars.map((each) => (each ? counted(each[bin].count) : null))),
    text: some.map((_, bin) => bars.map((each, step) => (each ? describe(each[bin], exactness[step]) : "no histogram"))),
    hovertemplate: "step %{x}: %{text} eigenvalues here<extra></extra>",
    colorscale: [
      [0, charts.color("panel")],
      [0.02, charts.color("density-low")],
      [1, charts.color("density-high")],
    ],
    colorbar: { title: { text: "eigenvalues" }, thickness: 12, outlinewidth: 0, ...countTicks(most) },
  };
}

// The outermost listed eigenvalues as points, which a histogram's bins blur.
const ends = (spectra, steps, axis, charts) => {
  const all = steps.map((_, index) => listed(spectra, index));
  const at = (position) => all.map((pairs) => pairs.at(position));
  return [
    line(steps, at(0), "largest", axis, charts.color("positive")),
    line(steps, at(-1), "smallest", axis, charts.color("negative")),
  ];
};

function ranks(spectra, steps, axis, charts) {
  const all = steps.map((_, index) => listed(spectra, index));
  return Array.from({ length: Math.max(...all.map(({ length }) => length)) }, (_, position) => {
    const pairs = all.map((each) => each[position]);
    const color = charts.color(pairs.find(Boolean).value < 0 ? "negative" : "positive");
    return line(steps, pairs, `eigenvalue ${position + 1}`, axis, color);
  });
}

const line = (steps, pairs, name, axis, color) => ({
  x: steps,
  y: pairs.map((pair) => (pair ? axis.position(pair.value) : null)),
  name,
  mode: "lines+markers",
  line: { color, width: 1 },
  marker: {
    color,
    size: pairs.map((pair) => (pair && !pair.converged ? 10 : 5)),
    symbol: pairs.map((pair) => (pair && !pair.converged ? "x" : "circle")),
  },
  text: pairs.map(
    (pair) =>
      pair && `${name}: ${short(pair.value, 5)} ± ${short(pair.residual, 1)}${pair.converged ? "" : ", not converged"}`,
  ),
  hovertemplate: "step %{x}: %{text}<extra></extra>",
});
