// What the two views of spectra share: one axis for all steps, listed eigenvalues, histogram bars on that axis.

import { signedLog } from "./numbers.js";

// The same axis at every step, so that nothing jumps while the steps play.
export function axisFor({ arrays: { eigenvalues, histogram } }) {
  let [smallest, largest] = [Infinity, 0];
  for (const value of eigenvalues.data) {
    const size = Math.abs(value);
    if (size > largest) largest = size;
    if (size > 0 && size < smallest) smallest = size;
  }
  const between = histogram?.data.some(Number.isFinite); // then there are eigenvalues between the listed ones and zero
  return largest > 0 ? signedLog(between ? 0 : smallest, largest) : signedLog(1e-2, 1);
}

// The eigenvalues listed at one step: value, residual, whether it converged, and rank by |λ| from 1.
export function listed({ arrays: { eigenvalues, residuals, converged } }, step) {
  const width = eigenvalues.shape[1];
  const pairs = [];
  for (let i = step * width; i < (step + 1) * width; i++) {
    const value = eigenvalues.data[i];
    if (Number.isFinite(value))
      pairs.push({ value, residual: residuals.data[i], converged: Boolean(converged.data[i]) });
  }
  const order = [...pairs].sort((a, b) => Math.abs(b.value) - Math.abs(a.value));
  order.forEach((pair, index) => (pair.rank = index + 1));
  return pairs;
}

// The histogram at one step on `axis`; everything in the middle of the axis is one bin. Null where there is none.
export function histogramAt({ arrays: { histogram, bin_edges: edges } }, step, axis) {
  if (!histogram || !edges) return null;
  const size = edges.data.length - 1;
  const counts = histogram.data.subarray(step * size, (step + 1) * size);
  if (!counts.length || Number.isNaN(counts[0])) return null;
  const middle = { left: -axis.middle, right: axis.middle, count: 0 };
  const below = [];
  const above = [];
  counts.forEach((count, i) => {
    const [left, right] = [axis.edgePosition(edges.data[i]), axis.edgePosition(edges.data[i + 1])];
    const inside = left === null || right === null || (left < 0 && right > 0);
    if (inside) middle.count += count;
    else if (Math.min(Math.abs(left), Math.abs(right)) < axis.reach)
      (right < 0 ? below : above).push({ left, right, count });
  });
  return [...below, middle, ...above];
}

// Whether the counts of one step's histogram are exact or estimated.
export function exactnessAt({ meta }, step) {
  const words = meta.histogram?.[step] ?? null;
  return { words, isEstimate: Boolean(words?.startsWith("estimated")) };
}

// Counts are drawn as log10(1 + count): one eigenvalue among a thousand remains visible.
export const counted = (count) => Math.log10(1 + count);

export function countTicks(bars) {
  const most = bars ? Math.max(...bars.map(({ count }) => count)) : 1;
  const values = [0, 1, 10, 100, 1000, 10000, 100000].filter((count) => count <= Math.max(1, most * 2));
  return { tickvals: values.map(counted), ticktext: values.map(String) };
}
