// Input, gradient, diagonal and top eigenvectors of one problem in the input's shape.

import { largestMagnitude } from "../canvas.js";
import { el, panel } from "../dom.js";
import { InputShape, drawMap } from "../input_shape.js";
import { short } from "../numbers.js";
import { className, columnTitle } from "../state.js";

const SIZE = 170;

export function maps({ state, source, charts }) {
  const frame = panel(
    "maps",
    "Directions in input space",
    "Along an eigenvector with a large |λ| the output bends most. Signs of eigenvectors are arbitrary. Every map has its own symmetric scale.",
  );

  async function update(isStale) {
    const { entry, step, sample, column, columnIndex } = state;
    if (entry.files === false) {
      frame.empty(entry.why_no_files);
      return;
    }
    const [problem, series] = await Promise.all([
      source.problem(entry.run, entry.tag, step, sample, columnIndex),
      source.series(entry.run, entry.tag),
    ]);
    await charts.before();
    if (isStale()) return;
    const { arrays, meta } = problem;
    const shape = new InputShape(meta.shape ?? entry.shape);
    const known = knownClasses(series, state.stepIndex, sample);
    const inputKind = shape.isColour ? "colour" : "grey";
    const norm = Math.sqrt(arrays.gradient.data.reduce((sum, value) => sum + value * value, 0));
    const figures = [
      figure(
        arrays.x.data,
        shape,
        inputKind,
        ["input", known.map(([word, k]) => `${word} ${className(entry, k)}`).join(", ")],
        "x",
      ),
      figure(arrays.gradient.data, shape, "signed", ["gradient", `‖g‖ = ${short(norm)}`], "gradient"),
      figure(arrays.diagonal.data, shape, "signed", ["diagonal of the Hessian", diagonalError(arrays)], "diagonal"),
      ...eigenvectors(arrays, shape),
    ];
    frame.clear();
    frame.tell(`${entry.target} of ${columnTitle(entry, column)}, sample ${sample}.`);
    frame.body.replaceChildren(...figures);
  }

  function eigenvectors(
    {
      eigenvectors: vectors,
      eigenvector_values: values,
      eigenvector_residuals: residuals,
      eigenvector_converged: converged,
    },
    shape,
  ) {
    if (!vectors) return [el("p", { className: "words" }, "No eigenvectors were kept.")];
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
    const canvas = el("canvas", { "aria-label": title, "data-testid": `map-${id}` });
    drawMap(canvas, values, shape, { kind, size: SIZE, textColour: charts.colour("text") });
    const caption = el("figcaption", {}, el("b", {}, title), words, el("span", { className: "warning" }, mark));
    return el("figure", {}, caption, canvas);
  }

  const key = () => JSON.stringify([state.run, state.sample, state.column, state.step]);
  return { ...frame, key, update };
}

function diagonalError({ diagonal_error: error }) {
  const most = error ? largestMagnitude(error.data) : 0;
  return most > 0 ? `estimated, standard error up to ${short(most, 2)}` : "exact to rounding";
}

// Label and prediction of a sample at one step, as far as known: [word, class number].
export function knownClasses({ arrays: { labels, predicted } }, step, sample) {
  const of = (array) => array && array.data[step * array.shape[1] + sample];
  return [
    ["label", of(labels)],
    ["predicted", of(predicted)],
  ].filter(([, number]) => number >= 0);
}
