// The entry of the page that `lightning-hessian report` writes. Nothing is fetched: every answer is in the page, in a block
// of gzipped safetensors that is opened when needed.

import { parseSafetensors, rowOf } from "./api.js";
import { el } from "./dom.js";
import { start } from "./index.js";
import { joined } from "./numbers.js";

// Draws the page around its catalog and blocks.
export async function render() {
  const catalog = JSON.parse(document.getElementById("catalog").textContent);
  const root = document.getElementById("root");
  await start(root, pageSource(document, catalog), { plotly: window.Plotly });
  const incomplete = catalog.runs.runs.flatMap(({ run, tags }) =>
    tags
      .filter(({ left_out: leftOut }) => leftOut)
      .map(({ name, target, left_out: leftOut }) =>
        el("li", {}, `${joined([run, name, target], " · ")}: ${leftOut}`),
      ),
  );
  if (incomplete.length) {
    const words = el("p", {}, "This page does not hold everything that the runs' own directories do.");
    const list = el("ul", {}, ...incomplete);
    root.querySelector("h1").after(el("section", { className: "panel", "data-testid": "left-out" }, words, list));
  }
  root.append(el("footer", { className: "hint" }, `Written by lightning-hessian ${catalog.version}. All data is in this page.`));
}

// Answers out of the blocks of `page`, a document; see api.js for the methods.
export function pageSource(page, catalog) {
  const blocks = new Map(catalog.blocks.map(({ run, tag, answers }) => [JSON.stringify([run, tag]), answers]));

  async function find(title, kind, run, tag, ...position) {
    const answers = blocks.get(JSON.stringify([run, tag]));
    const name = answers[[kind, ...position].join("/")];
    if (!name) throw new LeftOut(title, Object.keys(answers).filter((key) => key.startsWith(`${kind}/`)), position);
    return open(page.getElementById(`block-${name}`).textContent);
  }

  return {
    runs: async () => catalog.runs,
    series: (...which) => find("Curves", "series", ...which),
    spectra: (...which) => find("Spectra", "spectra", ...which),
    input: (...which) => find("The input", "input", ...which),
    maps: (...which) => find("Gradient, diagonal and eigenvectors", "maps", ...which),
    matrix: (...which) => find("The matrix", "matrix", ...which),
    row: async (...which) => {
      const { arrays, meta } = await find("Single rows", "whole", ...which.slice(0, -1));
      return { arrays: { row: { shape: [meta.size], data: rowOf(arrays.triangle.data, meta.size, which.at(-1)) } }, meta };
    },
  };
}

// What did not fit into the page. Shown as a remark, not as a failure.
class LeftOut extends Error {
  isExpected = true;

  constructor(title, keys, [step, sample]) {
    const of = (position) => keys.map((key) => key.split("/").slice(1).map(Number)).filter(position);
    const steps = ascending(of(([, each]) => each === sample).map(([each]) => each));
    const samples = ascending(of(([each]) => each === step).map(([, each]) => each));
    const here = steps.length
      ? `The page has it for ${steps.length > 1 ? "steps" : "step"} ${steps.join(", ")}.`
      : samples.length
        ? `At this step, the page has it for ${samples.length} samples, up to sample ${samples.at(-1)}.`
        : "";
    super(
      `${title} of sample ${sample} at step ${step} was left out to limit the size of this page. ${here} The run's own directory has ` +
        "everything, and lightning-hessian report --max-size writes a larger page.",
    );
  }
}

const ascending = (numbers) => [...new Set(numbers)].sort((a, b) => a - b);

async function open(text) {
  if (typeof DecompressionStream === "undefined") {
    throw new Error("This browser is older than 2023 and cannot unpack the data of this page. Open it in a newer one.");
  }
  const packed = Uint8Array.from(atob(text), (sign) => sign.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return parseSafetensors(await new Response(stream).arrayBuffer());
}
