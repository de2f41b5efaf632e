// What the measurement shown cost, and how it was computed.

import { el, panel } from "../dom.js";
import { short } from "../numbers.js";

const DRAWN_FROM = new Set([
  "layout",
  "name",
  "target",
  "columns",
  "class_names",
  "shape",
  "kept",
  "message",
  "method",
  "reason",
  "engine",
  "seconds",
  "num_matvecs",
  "diagnosis",
  "network",
  "complete",
  "num_inputs",
  "dtype",
  "step",
  "logged_step",
  "epoch",
  "moment",
  "overhead",
]);

export function cost({ state, source }) {
  const frame = panel("cost", "How it was computed, and what it cost", "Of the step shown.");

  async function update(isStale) {
    const { entry, step } = state;
    const [{ meta }, series] = await Promise.all([
      source.summary(entry.run, entry.tag, step),
      source.series(entry.run, entry.tag),
    ]);
    if (isStale()) return;
    const all = series.arrays.seconds.data;
    const problems = entry.num_samples * entry.columns.length;
    const total = all.reduce((sum, seconds) => sum + (seconds || 0), 0);
    const rows = [
      ["diagnosis", `${words(meta.diagnosis)}. ${meta.message}`],
      ["network", `the outputs themselves are ${words(meta.network)} in the input`],
      ["method", `${meta.method}: ${meta.reason}`],
      ["engine", words(meta.engine)],
      ["spectrum", meta.complete ? `complete: all ${meta.num_inputs} eigenvalues are known` : "its ends only"],
      [
        "time",
        `${short(meta.seconds)} s for ${problems} problems; ${short(total)} s over ${all.length} measurements so far`,
      ],
      ["overhead", meta.overhead === undefined ? null : `${short(100 * meta.overhead)} % of the training time`],
      ["products", `${meta.num_matvecs} Hessian-vector products for each problem`],
      [
        "numbers",
        `${meta.dtype}, D = ${meta.num_inputs} input entries, samples of shape ${(meta.shape ?? []).join("×")}`,
      ],
      ["moment", `${meta.moment}; the loggers' step is ${meta.logged_step ?? step}`],
      ["matrices", kept(meta.kept)],
      ["left out", series.meta.left_out],
      ...Object.entries(meta)
        .filter(([name, value]) => !DRAWN_FROM.has(name) && value !== null)
        .map(([name, value]) => [words(name), told(value)]),
    ];
    frame.clear();
    const shown = rows.filter(([, value]) => value);
    frame.body.replaceChildren(
      el("dl", {}, ...shown.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)])),
    );
  }

  const key = () => JSON.stringify([state.run, state.step, state.steps.length]);
  return { ...frame, key, update };
}

const words = (name) => String(name).replaceAll("_", " ");

function told(value) {
  if (value === null || typeof value !== "object") return String(value);
  return Object.entries(value)
    .map(([name, each]) => `${words(name)} ${told(each)}`)
    .join(", ");
}

function kept({ matrices = [], vectors, why_not: why } = {}) {
  const samples = matrices.length ? `kept of samples ${matrices.join(", ")}` : "none kept";
  return `${samples}; eigenvectors ${vectors ? "kept" : "not kept"}. ${why ?? ""}`;
}
