// Fetching. Every view asks a `source`; this one asks TensorBoard, that of the report looks into the page.
//
// A source has these async methods:
//   runs()                                        -> {format, metrics: [...], runs: [{run, tags: [...]}]}
//   series(run, tag)                              -> answer
//   spectra(run, tag, sample, classId)            -> answer
//   input(run, tag, step, sample)                 -> answer
//   maps(run, tag, step, sample, classId)         -> answer
//   matrix(run, tag, step, sample, classId)       -> answer
//   row(run, tag, step, sample, classId, index)   -> answer
// An answer is {arrays: {name: {shape, data}}, meta}; where there is none, an Error says why in a sentence.

const ANSWERS = {
  series: ["run", "tag"],
  spectra: ["run", "tag", "sample", "class_id"],
  input: ["run", "tag", "step", "sample"],
  maps: ["run", "tag", "step", "sample", "class_id"],
  matrix: ["run", "tag", "step", "sample", "class_id"],
  row: ["run", "tag", "step", "sample", "class_id", "index"],
};

const READERS = {
  F32: (buffer) => new Float32Array(buffer),
  F64: (buffer) => new Float64Array(buffer),
  I64: (buffer) => Float64Array.from(new BigInt64Array(buffer), Number),
  I32: (buffer) => new Int32Array(buffer),
  U8: (buffer) => new Uint8Array(buffer),
  BOOL: (buffer) => new Uint8Array(buffer),
};

// Arrays and metadata of a safetensors payload: 8 bytes of header length, a JSON header, then the data.
export function parseSafetensors(buffer) {
  const length = Number(new DataView(buffer).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length)));
  const { __metadata__: metadata = {}, ...entries } = header;
  const arrays = {};
  for (const [name, { dtype, shape, data_offsets: offsets }] of Object.entries(entries)) {
    const [start, end] = offsets.map((offset) => 8 + length + offset);
    if (!READERS[dtype]) throw new Error(`The array ${name} has the type ${dtype}, which this page cannot read.`);
    arrays[name] = { shape, data: READERS[dtype](buffer.slice(start, end)) };
  }
  const meta = metadata.lightning_hessian ? JSON.parse(metadata.lightning_hessian) : {};
  return { arrays, meta };
}

// One entry of an array, or undefined where there is no array.
export const entryOf = (array, ...indices) =>
  array?.data[indices.reduce((offset, index, axis) => offset * array.shape[axis] + index, 0)];

// Row `index` of a symmetric matrix, from its upper triangle row by row.
export function rowOf(triangle, size, index) {
  const start = (i) => i * size - (i * (i - 1)) / 2; // the position of the entry (i, i)
  const row = new Float32Array(size);
  for (let j = 0; j < index; j++) row[j] = triangle[start(j) + index - j];
  row.set(triangle.subarray(start(index), start(index) + size - index), index);
  return row;
}

// A symmetric matrix, row by row, from its upper triangle.
export function symmetric(triangle, size) {
  const values = new Float32Array(size * size);
  for (let i = 0; i < size; i++) values.set(rowOf(triangle, size, i), i * size);
  return values;
}

// The source that asks the plugin's routes below `base`.
export function httpSource(base) {
  async function ask(route, parameters = {}) {
    const url = new URL(route, base);
    for (const [name, value] of Object.entries(parameters)) url.searchParams.set(name, value);
    let response;
    try {
      response = await fetch(url);
    } catch {
      throw new Error("TensorBoard does not answer. If it is still running, reload this page.");
    }
    if (!response.ok) throw new Error(await errorMessage(response));
    return response;
  }
  const source = { runs: async () => (await ask("runs")).json() };
  for (const [route, names] of Object.entries(ANSWERS)) {
    source[route] = async (...values) => {
      const response = await ask(route, Object.fromEntries(names.map((name, i) => [name, values[i]])));
      return parseSafetensors(await response.arrayBuffer());
    };
  }
  return source;
}

async function errorMessage(response) {
  try {
    return (await response.json()).error;
  } catch {
    return `TensorBoard answered with status ${response.status} and no explanation. Its terminal output may say more.`;
  }
}

const MAX_CACHED = 100; // answers; a drawn matrix takes 2 MB
const GROWING = new Set(["series", "spectra"]); // these change when a run goes on

// The same source with a cache of answers, the least recently used dropped first. `renew` takes the answer to runs() and
// drops what may have grown, and answers about steps that were written again.
export function cached(source) {
  const entries = new Map();
  let written = new Map();

  const writtenAt = ([run, tag, step]) => written.get(JSON.stringify([run, tag, step]));

  function answer(method, values) {
    const key = JSON.stringify([method, ...values]);
    let entry = entries.get(key);
    if (!entry) {
      entry = { method, values, written: writtenAt(values), promise: source[method](...values) };
      entry.promise.catch(() => entries.get(key) === entry && entries.delete(key));
    }
    entries.delete(key);
    entries.set(key, entry); // the last is the one used last
    if (entries.size > MAX_CACHED) entries.delete(entries.keys().next().value);
    return entry.promise;
  }

  const wrapped = { runs: () => source.runs() };
  for (const method of Object.keys(ANSWERS)) wrapped[method] = (...values) => answer(method, values);
  wrapped.renew = (catalog) => {
    written = timesOf(catalog);
    for (const [key, entry] of [...entries]) {
      if (GROWING.has(entry.method) || entry.written !== writtenAt(entry.values)) entries.delete(key);
    }
  };
  return wrapped;
}

// When each step of each run and tag was written.
function timesOf({ runs }) {
  const all = runs.flatMap(({ run, tags }) =>
    tags.flatMap(({ tag, steps, written = [] }) => steps.map((step, i) => [JSON.stringify([run, tag, step]), written[i]])),
  );
  return new Map(all);
}
