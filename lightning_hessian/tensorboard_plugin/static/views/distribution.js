// How a metric is spread over many samples at the step shown: a histogram; a click selects a sample.

import { entryOf } from "../api.js";
import { panel } from "../dom.js";
import { joined, quantile, short } from "../numbers.js";
import { classTitle } from "../state.js";

const LEAST = 20; // samples; of fewer, the table says more
const MOST_BINS = 40;
const WIDE = 30; // ratio of the 99th to the 1st percentile above which positive values have a logarithmic axis
const GROUPS = ["predicted = label", "predicted ≠ label", "samples"];

export function distribution({ state, source, charts }) {
  const frame = panel(
    "distribution",
    "Distribution over samples at this step",
    "One count per sample, of the metric chosen above. The dotted line marks the sample shown; click a bar to go to its middle sample.",
  );

  async function update(isStale) {
    const { entry, metric, stepIndex, classId, classIndex } = state;
    frame.element.hidden = entry.num_samples < LEAST;
    if (frame.element.hidden) return;
    const { arrays } = await source.series(entry.run, entry.tag);
    if (isStale()) return;
    const values = valuesAt(arrays, metric.name, stepIndex, classIndex);
    const finite = values.filter(Number.isFinite).sort((a, b) => a - b);
    if (!finite.length) {
      frame.empty(`No sample has a finite ${metric.title} at this step.`);
      return;
    }
    const bins = binsOf(finite);
    const groups = groupsOf(arrays, stepIndex);
    const shown = GROUPS.map((name, group) => [name, bins.count(values, (sample) => groups[sample] === group), group]);
    frame.clear();
    frame.describe(inWords(`${metric.title} of ${classTitle(entry, classId)}`, finite, values.length));
    const colors = ["negative", "positive", "muted"].map((name) => charts.color(name));
    const own = values[state.sample];
    const line = { color: charts.color("accent"), width: 1.5, dash: "dot" };
    await charts.draw(
      frame.body,
      shown
        .filter(([, counts]) => counts.some(Boolean))
        .map(([name, counts, group]) => bars(name, counts, bins, colors[group])),
      {
        height: 260,
        barmode: "stack",
        bargap: 0.03,
        xaxis: { title: { text: metric.title + (bins.isLog ? " (logarithmic)" : "") }, ...bins.ticks },
        yaxis: { title: { text: "samples" } },
        shapes: Number.isFinite(own) ? [{ type: "line", x0: bins.at(own), x1: bins.at(own), y0: 0, y1: 1, yref: "paper", line }] : [],
        legend: { orientation: "h", y: 1.15 },
      },
    );
    frame.body.removeAllListeners("plotly_click");
    frame.body.on("plotly_click", ({ points }) => {
      const sample = bins.middle(values, points[0].pointNumber);
      if (sample !== null) state.set({ sample });
    });
  }

  const key = () =>
    JSON.stringify([state.run, state.metric, state.classId, state.sample, state.step, state.steps.length]);
  return { ...frame, key, update };
}

// One value for each sample.
function valuesAt(arrays, name, step, classIndex) {
  const length = arrays.lambda_max.shape[1];
  return Array.from({ length }, (_, n) => entryOf(arrays[name], step, n, classIndex) ?? NaN);
}

// Which of GROUPS every sample is in: right or wrong where its label is known.
function groupsOf({ labels, predicted, lambda_max: { shape } }, step) {
  return Array.from({ length: shape[1] }, (_, n) => {
    const [label, guess] = [labels, predicted].map((array) => entryOf(array, step, n) ?? -1);
    return label < 0 || guess < 0 ? 2 : label === guess ? 0 : 1;
  });
}

// Bins of equal width on a linear axis, or on a logarithmic one for positive values of very different sizes.
function binsOf(sorted) {
  const isLog = sorted[0] > 0 && quantile(sorted, 0.99) > WIDE * quantile(sorted, 0.01);
  const at = (value) => (isLog ? Math.log10(value) : value);
  const [low, high] = [at(sorted[0]), at(sorted.at(-1))];
  const number = high > low ? Math.min(MOST_BINS, Math.ceil(2 * Math.sqrt(sorted.length))) : 1;
  const width = high > low ? (high - low) / number : 1;
  const start = high > low ? low : low - width / 2;
  const binOf = (value) => Math.min(number - 1, Math.floor((at(value) - start) / width));
  const edge = (bin) => (isLog ? 10 ** (start + bin * width) : start + bin * width);
  const ticks = isLog
    ? { tickvals: decades(low, high), ticktext: decades(low, high).map((each) => short(10 ** each, 1)) }
    : { exponentformat: "power" };
  return {
    isLog,
    at,
    width,
    ticks,
    centers: Array.from({ length: number }, (_, bin) => start + (bin + 0.5) * width),
    words: (bin) => `${short(edge(bin))} to ${short(edge(bin + 1))}`,
    count(values, isIn) {
      const counts = new Array(number).fill(0);
      values.forEach((value, sample) => Number.isFinite(value) && isIn(sample) && counts[binOf(value)]++);
      return counts;
    },
    // The sample whose value is in the middle of those in a bin.
    middle(values, bin) {
      const inside = values.map((value, sample) => [value, sample]).filter(([value]) => Number.isFinite(value) && binOf(value) === bin);
      inside.sort(([a], [b]) => a - b);
      return inside.length ? inside[Math.floor((inside.length - 1) / 2)][1] : null;
    },
  };
}

function decades(low, high) {
  const all = [];
  for (let each = Math.floor(low); each <= Math.ceil(high); each++) all.push(each);
  return all;
}

const bars = (name, counts, bins, color) => ({
  type: "bar",
  name,
  x: bins.centers,
  y: counts,
  width: bins.width,
  marker: { color },
  text: counts.map((count, bin) => `${count} (${name}), ${bins.words(bin)}`),
  textposition: "none",
  hovertemplate: "%{text}<extra></extra>",
});

function inWords(what, sorted, total) {
  const [low, lower, median, upper, high] = [0.1, 0.25, 0.5, 0.75, 0.9].map((share) => short(quantile(sorted, share)));
  const missing = total - sorted.length;
  return joined([
    `${what}: median ${median}, quartiles ${lower} and ${upper}, 10th and 90th percentile ${low} and ${high},`,
    `from ${short(sorted[0])} to ${short(sorted.at(-1))}, of ${sorted.length} samples.`,
    missing && `${missing} ${missing === 1 ? "is" : "are"} left out: infinite, undefined or not valid.`,
  ]);
}
