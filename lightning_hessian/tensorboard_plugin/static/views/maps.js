// Input, gradient, diagonal and top eigenvectors of one sample and class in the input's shape.

import { entryOf } from "../api.js";
import { el, panel } from "../dom.js";
import { InputShape, drawMap } from "../input_shape.js";
import { joined, short } from "../numbers.js";
import { classTitle, outputName } from "../state.js";

const SIZE = 170;

export function maps({ state, source, charts }) {
  const frame = panel(
    "maps",
    "Directions in input space",
    "The output curves most along the eigenvectors with large |λ|. Their signs are arbitrary. Each map has its own symmetric scale.",
  );

  async function update(isStale) {
    const { entry, step, stepIndex, sample, classId, classIndex } = state;
    if (entry.files === false) {
      frame.empty(entry.why_no_files);
      return;
    }
    const [input, { arrays, meta }, series] = await Promise.all([
      source.input(entry.run, entry.tag, step, sample),
      source.maps(entry.run, entry.tag, step, sample, classId),
      source.series(entry.run, entry.tag),
    ]);
    await charts.before();
    if (isStale()) return;
    const shape = new InputShape(input.meta.shape);
    const known = knownOutputs(entry, series, stepIndex, sample);
    const inputKind = shape.isColor ? "color" : "gray";
    const norm = entryOf(series.arrays.gradient_norm, stepIndex, sample, classIndex);
    const outputs = known.map(([word, k]) => `${word} ${outputName(entry, k)}`).join(", ");
    const isValid = entryOf(series.arrays.valid, stepIndex, sample, classIndex) !== 0;
    const figures = [figure(input.arrays.x.data, shape, inputKind, ["input", outputs], "x")];
    if (isValid) {
      figures.push(
        figure(arrays.gradient.data, shape, "signed", ["gradient", `‖g‖ = ${short(norm)}`], "gradient"),
        figure(arrays.diagonal.data, shape, "signed", ["diagonal of the Hessian", diagonalError(meta)], "diagonal"),
        ...eigenvectors(arrays, shape),
      );
    }
    frame.clear();
    frame.describe(
      joined([
        `${entry.target} of ${classTitle(entry, classId)}, sample ${sample}.`,
        !isValid && "The Hessian is not valid at this step, so only the input is shown: the diagnosis below says why.",
      ]),
    );
    frame.body.replaceChildren(...figures);
  }

  function eigenvectors(arrays, shape) {
    const vectors = arrays.eigenvectors;
    const [values, residuals, converged] = ["values", "residuals", "converged"].map((name) => arrays[`eigenvector_${name}`]);
    if (!vectors) return [el("p", { className: "words" }, "No eigenvectors were stored.")];
    const [count, size] = vectors.shape;
    return Array.from({ length: count }, (_, rank) => {
      const value = values.data[rank];
      const title = `eigenvector ${rank + 1} by |λ|`;
      if (value === 0) return el("figure", {}, el("figcaption", {}, el("b", {}, title), "no direction: λ = 0"));
      const words = `λ = ${short(value, 4)} ± ${short(residuals.data[rank], 1)}`;
      const mark = converged.data[rank] ? "" : "not converged";
      const vector = vectors.data.subarray(rank * size, (rank + 1) * size);
      return figure(vector, shape, "signed", [title, words, mark], `eigenvector-${rank}`);
    });
  }

  function figure(values, shape, kind, [title, words, mark = ""], id) {
    const canvas = el("canvas", { role: "img", "aria-label": title, "data-testid": `map-${id}` });
    drawMap(canvas, values, shape, { kind, size: SIZE, textColor: charts.color("text") });
    const caption = el("figcaption", {}, el("b", {}, title), words, el("span", { className: "warning" }, mark));
    return el("figure", {}, caption, canvas);
  }

  const key = () => JSON.stringify([state.run, state.sample, state.classId, state.step]);
  return { ...frame, key, update };
}

function diagonalError({ largest_diagonal_error: error }) {
  return error === 0 ? "exact to rounding" : `estimated, standard error up to ${short(error ?? NaN, 2)}`;
}

// Label and prediction of a sample at one step, as far as known: [word, number of the output].
function knownOutputs(entry, { arrays: { labels, predicted } }, step, sample) {
  return [
    ["label", entryOf(labels, step, sample)],
    ["predicted", entry.has_classes === false ? -1 : entryOf(predicted, step, sample)], // the largest output of a regression predicts nothing
  ].filter(([, number]) => number >= 0);
}
