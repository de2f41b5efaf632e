// Fetching. Every view asks a `source`; this one asks TensorBoard, the report's own answers from the page.
//
// A source has these async methods:
//   runs()                                          -> {layout, runs: [{run, tags: [...]}]}
//   series(run, tag)                                -> answer
//   spectra(run, tag, sample, column)               -> answer
//   summary(run, tag, step)                         -> answer
//   problem(run, tag, step, sample, column)         -> answer
//   matrix(run, tag, step, sample, column, size)    -> answer
//   row(run, tag, step, sample, column, index)      -> answer
// An answer is {arrays: {name: {shape, data}}, meta}; what cannot be given is an Error whose message is a sentence.

const READERS = {
  F32: (buffer) => new Float32Array(buffer),
  F64: (buffer) => new Float64Array(buffer),
  F16: (buffer) => Float32Array.from(new Uint16Array(buffer), halfToNumber),
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
  for (const [
    name,
    {
      dtype,
      shape,
      data_offsets: [start, end],
    },
  ] of Object.entries(entries)) {
    if (!READERS[dtype]) throw new Error(`The array ${name} has the type ${dtype}, which this page cannot read.`);
    arrays[name] = { shape, data: READERS[dtype](buffer.slice(8 + length + start, 8 + length + end)) };
  }
  const meta = metadata.lightning_hessian ? JSON.parse(metadata.lightning_hessian) : {};
  return { arrays, meta };
}

function halfToNumber(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 0x1f;
  const fraction = bits & 0x3ff;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}

// The source that asks the plugin's routes below `base`.
export function httpSource(base) {
  async function ask(route, parameters) {
    const url = new URL(route, base);
    for (const [name, value] of Object.entries(parameters)) url.searchParams.set(name, value);
    let response;
    try {
      response = await fetch(url);
    } catch {
      throw new Error("TensorBoard does not answer. Is it still running? Then reload this page.");
    }
    if (!response.ok) throw new Error(await sentence(response));
    return response;
  }
  const binary = async (route, parameters) => parseSafetensors(await (await ask(route, parameters)).arrayBuffer());
  return {
    runs: async () => (await ask("runs", {})).json(),
    series: (run, tag) => binary("series", { run, tag }),
    spectra: (run, tag, sample, column) => binary("spectra", { run, tag, sample, column }),
    summary: (run, tag, step) => binary("summary", { run, tag, step }),
    problem: (run, tag, step, sample, column) => binary("problem", { run, tag, step, sample, column }),
    matrix: (run, tag, step, sample, column, size) => binary("matrix", { run, tag, step, sample, column, size }),
    row: (run, tag, step, sample, column, index) => binary("row", { run, tag, step, sample, column, index }),
  };
}

async function sentence(response) {
  try {
    return (await response.json()).error;
  } catch {
    return `TensorBoard answered with status ${response.status} and no explanation; its terminal may say more.`;
  }
}

const MAX_CACHED_BYTES = 2 ** 28;
const GROWING = new Set(["series", "spectra"]); // these change when a run goes on

// The same source with its answers kept, the least recently used forgotten first; `renew` takes the answer to runs() and
// forgets what may have grown, and of single steps what was written anew.
export function cached(source) {
  const kept = new Map();
  let bytes = 0;
  let written = new Map();

  const writtenAt = ([run, tag, step]) => written.get(JSON.stringify([run, tag, step]));

  function forget(key) {
    bytes -= kept.get(key).bytes;
    kept.delete(key);
  }

  function remember(method, values) {
    const key = JSON.stringify([method, ...values]);
    const known = kept.get(key);
    if (known) {
      kept.delete(key);
      kept.set(key, known);
      return known.promise;
    }
    const entry = { method, values, written: writtenAt(values), bytes: 0, promise: source[method](...values) };
    kept.set(key, entry);
    entry.promise.then(
      (answer) => {
        if (kept.get(key) !== entry) return;
        entry.bytes = Object.values(answer.arrays).reduce((sum, { data }) => sum + data.byteLength, 0);
        bytes += entry.bytes;
        for (const oldest of [...kept.keys()]) {
          if (bytes <= MAX_CACHED_BYTES || oldest === key) break;
          forget(oldest);
        }
      },
      () => kept.get(key) === entry && kept.delete(key),
    );
    return entry.promise;
  }

  const through = { runs: () => source.runs() };
  for (const method of ["series", "spectra", "summary", "problem", "matrix", "row"]) {
    through[method] = (...values) => remember(method, values);
  }
  through.renew = (catalog) => {
    written = timesOf(catalog);
    for (const [key, entry] of [...kept]) {
      if (GROWING.has(entry.method) || entry.written !== writtenAt(entry.values)) forget(key);
    }
  };
  return through;
}

// When each step of each run and tag was written.
function timesOf({ runs }) {
  const all = runs.flatMap(({ run, tags }) =>
    tags.flatMap(({ tag, steps, written = [] }) => steps.map((step, i) => [JSON.stringify([run, tag, step]), written[i]])),
  );
  return new Map(all);
}

// A single number that an answer gives as an array of one or in its metadata.
export function scalar(answer, name) {
  const array = answer.arrays[name];
  return array ? array.data[0] : answer.meta[name];
}
