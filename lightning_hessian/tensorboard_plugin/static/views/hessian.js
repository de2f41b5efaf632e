// The Hessian of one problem as a heatmap, and one of its rows in the input's shape.

import { el, named, panel } from "../dom.js";
import { scalar } from "../api.js";
import { InputShape, drawMap } from "../input_shape.js";
import { MatrixView } from "../matrix_view.js";
import { short } from "../numbers.js";
import { RowReader } from "../row_reader.js";
import { columnTitle } from "../state.js";

const DRAWN = 1024; // cells across at most; a larger matrix comes with several entries in a cell
const SIDE = 500;
const MAP = 300;

export function hessian({ state, source, charts }) {
  const frame = panel(
    "hessian",
    "The Hessian, entry by entry",
    "Red: positive, blue: negative. Wheel or drag a square to zoom, double-click to see all. Point at a pixel of the input: the map beside it shows that pixel's row of the Hessian, that is, with which other pixels it interacts. Click to hold it.",
  );
  const heatmap = el("canvas", { className: "exact", "aria-label": "the Hessian as a heatmap", ...named("heatmap") });
  const readout = el("p", { className: "readout", ...named("heatmap-readout") });
  const input = el("canvas", { className: "exact", "aria-label": "the input", ...named("input-map") });
  const row = el("canvas", { "aria-label": "one row of the Hessian", ...named("row-map") });
  const channel = el("select", { ...named("channel-select"), onchange: () => drawInput() });
  const channelChoice = el("label", { className: "choice" }, el("span", {}, "channel"), channel);
  const rowTitle = el("figcaption", { ...named("row-title") });
  const inputFigure = el("figure", {}, el("figcaption", {}, "input: point at a pixel"), channelChoice, input);
  const rowFigure = el("figure", {}, rowTitle, row);
  frame.body.append(
    el(
      "div",
      { className: "beside" },
      el("div", {}, heatmap, readout),
      el("div", { className: "stack" }, inputFigure, rowFigure),
    ),
  );

  const view = new MatrixView(heatmap, {
    side: SIDE,
    colour: (name) => charts.colour(name),
    point: (i, j) => i !== null && state.hover.point(i, j),
    pick: (i) => state.hover.pin(i),
  });
  let shown = null; // everything that is drawn now
  let entryAt = () => null;

  const pointed = (event) => entryAt(event);
  input.addEventListener("pointermove", (event) => pointed(event) !== null && state.hover.point(pointed(event)));
  input.addEventListener("click", (event) => pointed(event) !== null && state.hover.pin(pointed(event)));
  state.hover.listen(follow);

  async function update(isStale) {
    const { entry, step, sample, columnIndex } = state;
    if (entry.files === false) {
      frame.empty(entry.why_no_files);
      return;
    }
    const where = [entry.run, entry.tag, step, sample, columnIndex];
    const problem = await source.problem(...where);
    if (isStale()) return;
    if (problem.meta.matrix === "none") {
      frame.empty(`No matrix for this problem. ${problem.meta.why_not ?? ""}`);
      return;
    }
    const answer = await source.matrix(...where, DRAWN);
    if (isStale()) return;
    const matrix = {
      values: answer.arrays.matrix.data,
      shown: answer.arrays.matrix.shape[0],
      ...Object.fromEntries(["size", "block", "limit", "largest"].map((name) => [name, scalar(answer, name)])),
    };
    const { size, block, values } = matrix;
    const diagonal =
      block > 1 ? problem.arrays.diagonal.data : Float32Array.from({ length: size }, (_, i) => values[i * size + i]);
    shown = {
      problem,
      matrix,
      rows: new RowReader(source, where, matrix),
      shape: new InputShape(problem.meta.shape ?? entry.shape),
      start: largest(diagonal), // the row shown until one is pointed at
    };
    frame.clear();
    frame.tell(inWords(entry, state, problem, matrix));
    channelChoice.hidden = !shown.shape.isColour;
    if (shown.shape.isColour && !channel.length)
      channel.append(...["red", "green", "blue"].map((name, i) => el("option", { value: i }, name)));
    view.show(matrix);
    await follow();
  }

  // Shows the row that is pointed at, or else that of the largest diagonal entry.
  async function follow() {
    if (!shown) return;
    const mine = shown;
    const { row: pointedRow, column, pinned } = state.hover;
    const index = pointedRow ?? mine.start;
    view.mark(index, column);
    drawInput();
    let values;
    try {
      values = await mine.rows.read(index);
    } catch (error) {
      readout.textContent = error.message;
      return;
    }
    if (values === null || mine !== shown) return; // another row has been pointed at since
    const { shape } = mine;
    const how = pinned ? "held; click again to let go" : pointedRow === null ? "largest diagonal entry" : "";
    rowTitle.textContent = `row ${index} of the Hessian: ${shape.describe(index)}${how && ` (${how})`}`;
    drawMap(row, values, shape, { kind: "signed", size: MAP, marks: marks(), textColour: charts.colour("text") });
    row.dataset.row = index;
    const at = column ?? index;
    readout.textContent = `H[${index}, ${at}] = ${short(values[at], 5)}   i = ${index}: ${shape.describe(index)};   j = ${at}: ${shape.describe(at)}`;
    Object.assign(readout.dataset, { row: index, column: at, value: values[at] });
  }

  function marks() {
    const { row: pointedRow, column } = state.hover;
    const index = pointedRow ?? shown.start;
    const other = column === null ? [] : [{ index: column, colour: charts.colour("muted") }];
    return [...other, { index, colour: charts.colour("accent") }];
  }

  function drawInput() {
    if (!shown) return;
    const { shape, problem } = shown;
    const kind = shape.isColour ? "colour" : "grey";
    const options = {
      kind,
      size: MAP,
      marks: marks(),
      channel: Number(channel.value),
      textColour: charts.colour("text"),
    };
    entryAt = drawMap(input, problem.arrays.x.data, shape, options);
  }

  const key = () => JSON.stringify([state.run, state.sample, state.column, state.step]);
  return { ...frame, key, update };
}

function largest(values) {
  let best = 0;
  values.forEach((value, index) => {
    if (Math.abs(value) > Math.abs(values[best])) best = index;
  });
  return best;
}

function inWords(entry, { sample, column }, { meta }, { size, block, limit, largest: most }) {
  return [
    `${entry.target} of ${columnTitle(entry, column)}, sample ${sample}: ${size}×${size} entries in ${entry.target} per input unit².`,
    most > limit && `Colours end at ±${short(limit)}, the 99th percentile; the largest |entry| is ${short(most)}.`,
    block > 1 && `Each cell shows the largest of ${block}×${block} entries; the value under the pointer is ${meta.precision ? "that of one entry" : "exact"}.`,
    meta.matrix === "from eigenvectors" && "Put together from its eigenvectors, which are complete.",
    meta.precision,
    most === 0 && "It is exactly zero.",
  ]
    .filter(Boolean)
    .join(" ");
}
