// The source of a page of its own: everything is in the page, in blocks of gzipped safetensors that are opened when asked.

import { parseSafetensors } from "./api.js";

const METRICS_END = new Set(["steps", "epochs", "seconds", "num_matvecs"]); // of a series: one number per step
const PER_STEP = ["moment", "method", "engine", "diagnosis", "network", "message", "reason"];
const BINS = 64;
const REACH = 20; // of the histograms' axis to both sides
const PERCENTILE = 0.99;
const OPEN_AT_ONCE = 6; // maps and matrices; curves and spectra stay open

// Answers from the catalog and the blocks of `page`, a document; see api.js for the methods.
export function pageSource(page, catalog) {
  const where = new Map(catalog.blocks.map((blocks) => [JSON.stringify([blocks.run, blocks.tag]), blocks]));
  const entries = new Map(
    catalog.runs.runs.flatMap(({ run, tags }) => tags.map((entry) => [JSON.stringify([run, entry.tag]), entry])),
  );
  const small = new Map();
  const large = new Map();

  function open(name, kept = large) {
    const opened = kept.get(name) ?? unpack(page.getElementById(`block-${name}`).textContent);
    kept.delete(name);
    kept.set(name, opened);
    if (kept === large && large.size > OPEN_AT_ONCE) large.delete(large.keys().next().value);
    return opened;
  }

  function find(run, tag, step = null) {
    const key = JSON.stringify([run, tag]);
    const [blocks, entry] = [where.get(key), entries.get(key)];
    if (!blocks) throw new Error(`The run ${run} is not on this page.`);
    const place = step === null ? null : entry.steps.indexOf(step);
    if (place === -1) throw new Error(`There is no measurement at step ${step} on this page.`);
    return { blocks, entry, place };
  }

  const allSpectra = ({ spectra }) => Promise.all(spectra.map((name) => open(name, small)));

  async function series(run, tag) {
    const { blocks, entry } = find(run, tag);
    const { arrays, meta } = await open(blocks.series, small);
    const words = PER_STEP.map((name) => [name, meta.summaries.map((summary) => summary[name])]);
    return { arrays, meta: { ...Object.fromEntries(words), left_out: entry.left_out } };
  }

  async function spectra(run, tag, sample, column) {
    const { blocks, entry } = find(run, tag);
    const [opened, { meta }] = await Promise.all([allSpectra(blocks), open(blocks.series, small)]);
    const width = Math.max(...opened.map(({ arrays }) => arrays.eigenvalues.shape[2]));
    const over = (name, length) => ({
      shape: [opened.length, length],
      data: joined(opened.map(({ arrays }) => arrays[name] && problemOf(arrays[name], sample, column)), length),
    });
    const arrays = Object.fromEntries(["eigenvalues", "residuals", "converged"].map((name) => [name, over(name, width)]));
    return {
      arrays: {
        steps: { shape: [entry.steps.length], data: Float64Array.from(entry.steps) },
        ...arrays,
        histogram: over("histogram", BINS),
        bin_edges: { shape: [BINS + 1], data: Float32Array.from({ length: BINS + 1 }, (_, i) => (2 * REACH * i) / BINS - REACH) },
      },
      meta: { histogram: meta.summaries.map((each) => each.histogram) },
    };
  }

  async function summary(run, tag, step) {
    const { blocks, place } = find(run, tag, step);
    const [curves, spectrum] = await Promise.all([open(blocks.series, small), open(blocks.spectra[place], small)]);
    const over = Object.entries(curves.arrays).filter(([name]) => !METRICS_END.has(name));
    const own = Object.fromEntries(over.map(([name, array]) => [name, slice(array, place)]));
    return { arrays: { ...own, ...spectrum.arrays }, meta: curves.meta.summaries[place] };
  }

  async function problem(run, tag, step, sample, column) {
    const { blocks, entry, place } = find(run, tag, step);
    if (!(place in blocks.maps)) throw new Error(notHere("Inputs, gradients and eigenvectors", blocks.maps, entry, step));
    const [x, maps, { meta }] = await Promise.all([open(blocks.x[place]), open(blocks.maps[place]), summary(run, tag, step)]);
    const arrays = { x: slice(x.arrays.x, sample) };
    for (const [name, array] of Object.entries(maps.arrays)) {
      const told = name.startsWith("vector_") ? `eigenvector_${name.slice(7).replace("eigenvalues", "values")}` : name;
      if (name !== "whole") arrays[told] = slice(slice(array, sample), column);
    }
    const whole = maps.arrays.whole && slice(slice(maps.arrays.whole, sample), column).data[0];
    const kept = blocks.matrices[place]?.[`${sample},${column}`];
    const matrix = kept ? "kept" : whole ? "from eigenvectors" : "none";
    const was = meta.kept.matrices.includes(sample);
    const why_not = was ? notHere("Matrices", blocks.matrices, entry, step) : (meta.kept.why_not ?? "heatmap_samples says of how many samples matrices are formed.");
    return { arrays, meta: { ...meta, shape: arrays.x.shape, matrix, why_not: matrix === "none" ? why_not : null, precision: kept ? meta.precision : null } };
  }

  // A function that gives any row [D] of the problem's matrix.
  async function rows(run, tag, step, sample, column) {
    const { blocks, place } = find(run, tag, step);
    const { arrays, meta } = await problem(run, tag, step, sample, column);
    const size = arrays.gradient.data.length;
    if (meta.matrix === "none") throw new Error(meta.why_not);
    if (meta.matrix === "from eigenvectors") return { size, meta, row: fromEigenvectors(arrays, size) };
    const kept = (await open(blocks.matrices[place][`${sample},${column}`])).arrays;
    return { size, meta, row: kept.triangle ? fromTriangle(kept.triangle.data, size) : (i) => slice(kept.matrix, i).data };
  }

  async function matrix(run, tag, step, sample, column, size) {
    const found = await rows(run, tag, step, sample, column);
    const { values, shown, block, largest, limit } = drawn(found.row, found.size, size);
    const meta = { matrix: found.meta.matrix, limit: limit || largest, largest, size: found.size, block };
    return { arrays: { matrix: { shape: [shown, shown], data: values } }, meta };
  }

  async function row(run, tag, step, sample, column, index) {
    const found = await rows(run, tag, step, sample, column);
    return { arrays: { row: { shape: [found.size], data: found.row(index) } }, meta: { index } };
  }

  return { runs: async () => catalog.runs, series, spectra, summary, problem, matrix, row };
}

async function unpack(text) {
  if (typeof DecompressionStream === "undefined") {
    throw new Error("This browser is older than 2023 and cannot unpack the data of this page. Open it in a newer one.");
  }
  const packed = Uint8Array.from(atob(text), (sign) => sign.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return parseSafetensors(await new Response(stream).arrayBuffer());
}

// One entry along the first axis.
function slice({ shape: [, ...shape], data }, index) {
  const length = shape.reduce((product, each) => product * each, 1);
  return { shape, data: data.subarray(index * length, (index + 1) * length) };
}

const problemOf = (array, sample, column) => slice(slice(array, sample), column).data;

// Rows of equal `length` on top of each other; what is missing is not a number.
function joined(rows, length) {
  const data = new Float32Array(rows.length * length).fill(NaN);
  rows.forEach((row, index) => row && data.set(row, index * length));
  return data;
}

function notHere(what, places, entry, step) {
  const here = Object.keys(places).map((place) => entry.steps[place]);
  const known = here.length ? `Here they are of ${here.length > 1 ? "steps" : "step"} ${here.join(", ")}.` : "This page has none of this run.";
  return `${what} of step ${step} were left out to keep this page small. ${known} ` +
    "The run's own directory has them, and lightning-hessian report --max-size makes a larger page.";
}

function fromTriangle(triangle, size) {
  const start = (i) => i * size - (i * (i - 1)) / 2; // where the entry (i, i) lies
  return (i) => {
    const row = new Float64Array(size);
    for (let j = 0; j < i; j++) row[j] = triangle[start(j) + i - j];
    row.set(triangle.subarray(start(i), start(i) + size - i), i);
    return row;
  };
}

// Σ λ v vᵀ.
function fromEigenvectors({ eigenvectors, eigenvector_values: values }, size) {
  return (i) => {
    const row = new Float64Array(size);
    values.data.forEach((value, v) => {
      const vector = eigenvectors.data.subarray(v * size, (v + 1) * size);
      const factor = value * vector[i];
      for (let j = 0; factor && j < size; j++) row[j] += factor * vector[j];
    });
    return row;
  };
}

// At most `most` cells across, each the entry of largest magnitude in its block; the 99th percentile of |H|; its largest.
function drawn(rowOf, size, most) {
  const block = Math.ceil(size / most);
  const shown = Math.ceil(size / block);
  const values = new Float32Array(shown * shown);
  const magnitudes = new Float32Array(size * size);
  for (let i = 0; i < size; i++) {
    const row = rowOf(i);
    const first = Math.floor(i / block) * shown;
    for (let j = 0; j < size; j++) {
      const cell = first + Math.floor(j / block);
      magnitudes[i * size + j] = Math.abs(row[j]);
      if (Math.abs(row[j]) > Math.abs(values[cell])) values[cell] = row[j];
    }
  }
  const [limit, largest] = ranked(magnitudes, [PERCENTILE, 1]);
  return { values, shown, block, limit, largest };
}

// Values at shares of the sorted order, found without sorting: the bits of floats that are not negative are in order.
function ranked(magnitudes, shares) {
  const bits = new Uint32Array(magnitudes.buffer);
  const high = new Uint32Array(1 << 16);
  for (const each of bits) high[each >>> 16]++;
  return shares.map((share) => {
    let [rank, top] = [Math.ceil(share * (bits.length - 1)), 0];
    while (rank >= high[top]) rank -= high[top++];
    const low = new Uint32Array(1 << 16);
    for (const each of bits) if (each >>> 16 === top) low[each & 0xffff]++;
    let bottom = 0;
    while (rank >= low[bottom]) rank -= low[bottom++];
    return new Float32Array(Uint32Array.of(top * 65536 + bottom).buffer)[0];
  });
}
