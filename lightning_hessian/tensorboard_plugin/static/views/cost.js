// How the measurement shown was computed, and what it cost.

import { el, panel } from "../dom.js";
import { percent, short } from "../numbers.js";
import { outputWord, plural } from "../state.js";

export function cost({ state, source }) {
  const frame = panel("cost", "How it was computed, and what it cost", "At the step shown.");

  async function update(isStale) {
    const { entry, step, stepIndex } = state;
    const { arrays, meta } = await source.series(entry.run, entry.tag);
    if (isStale()) return;
    const at = (name) => meta[name][stepIndex];
    const [seconds, matvecs] = ["seconds", "num_matvecs"].map((name) => arrays[name].data[stepIndex]);
    const measurements = state.steps.length === 1 ? "1 measurement" : `${state.steps.length} measurements`;
    const overhead = at("overhead");
    const output = outputWord(entry);
    const rows = [
      ["diagnosis", `${words(at("diagnosis"))}. ${at("message")}`],
      ["finite differences", at("validity")],
      ["network", `the outputs themselves are ${words(at("network"))} in the input`],
      ["method", `${at("method")}: ${at("reason")}`],
      ["autodiff mode", words(at("autodiff_mode"))],
      ["spectrum", at("complete") ? `complete: all ${entry.num_inputs} eigenvalues are known` : "only its ends are known"],
      [
        "time",
        `${short(seconds)} s for ${counted(entry.num_samples, "sample")} × ${counted(entry.class_ids.length, output, plural(output))}; ` +
          `${short(meta.total_seconds)} s for ${measurements} so far`,
      ],
      ["overhead", overhead === null ? null : `${percent(overhead)} of the training time`],
      ["matrix–vector products", `${matvecs} Hessian-vector products for each sample and ${output}`],
      [
        "numbers",
        `${at("dtype")}, D = ${entry.num_inputs} input entries, samples of shape ${(entry.shape ?? []).join("×")}`,
      ],
      ["when", `${at("when")}; the loggers' step is ${step}`],
      ["in the file", inFile(at("in_file"))],
      ["left out", meta.left_out],
    ];
    frame.clear();
    frame.body.replaceChildren(
      el("dl", {}, ...rows.flatMap(([name, value]) => (value ? [el("dt", {}, name), el("dd", {}, value)] : []))),
    );
  }

  const key = () => JSON.stringify([state.run, state.step, state.steps.length]);
  return { ...frame, key, update };
}

const words = (name) => String(name).replaceAll("_", " ");

const counted = (count, one, several = `${one}s`) => `${count} ${count === 1 ? one : several}`;

function inFile({ matrices = [], eigenvectors, why_no_matrix: why } = {}) {
  const [first, last] = [matrices[0], matrices.at(-1)];
  const isRange = matrices.length > 2 && last - first === matrices.length - 1;
  const which = isRange ? `samples ${first} to ${last}` : `sample${last === first ? "" : "s"} ${matrices.join(", ")}`;
  const samples = matrices.length ? `the whole ${last === first ? "matrix" : "matrices"} of ${which}` : "no whole matrix";
  return `${samples}; ${eigenvectors ? "eigenvectors" : "no eigenvectors"}. ${why ?? ""}`;
}
