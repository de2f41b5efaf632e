// The Hessian of one sample and class as a heatmap, and one of its rows in the input's shape.

import { el, named, panel, usableByKeys } from "../dom.js";
import { symmetric } from "../api.js";
import { InputShape, drawMap } from "../input_shape.js";
import { MatrixView, ZOOM } from "../matrix_view.js";
import { joined, short } from "../numbers.js";
import { classTitle, outputWord } from "../state.js";

const SIDE = 500;
const MAP = 300;
const KEYS = "arrow keys move, Enter pins";

export function hessian({ state, source, charts }) {
  const frame = panel(
    "hessian",
    "The Hessian, entry by entry",
    "Red is positive, blue is negative. Use the wheel or drag a square to zoom, double-click to see all. Point at an entry of the input, such as a pixel: the map beside it shows that entry's row of the Hessian, that is, which other entries it interacts with. Click to pin it. By keyboard, in the heatmap or the input: arrow keys move (with Shift by ten), Enter pins; in the heatmap, + and − zoom, and 0 shows all.",
  );
  const readout = el("p", { className: "readout", role: "status", ...named("heatmap-readout") });
  const byKeys = { role: "application", className: "exact", "aria-describedby": readout.id }; // arrow keys reach it
  const heatmap = el("canvas", { ...byKeys, "aria-label": `the Hessian as a heatmap: ${KEYS}`, ...named("heatmap") });
  const input = el("canvas", { ...byKeys, "aria-label": `the input: ${KEYS}`, ...named("input-map") });
  const row = el("canvas", { role: "img", "aria-label": "one row of the Hessian", ...named("row-map") });
  const channel = el("select", { ...named("channel-select"), onchange: () => drawInput() });
  const channelChoice = el("label", { className: "choice" }, el("span", {}, "channel"), channel);
  const rowTitle = el("figcaption", { ...named("row-title") });
  const inputFigure = el("figure", {}, el("figcaption", {}, "input: point at an entry"), channelChoice, input);
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
    color: (name) => charts.color(name),
    point: (i, j) => i !== null && state.hover.point(i, j),
    pick: (i) => state.hover.pin(i),
  });
  let shown = null; // everything that is drawn now
  let entryAt = () => null;

  const pointed = (event) => entryAt(event);
  input.addEventListener("pointermove", (event) => pointed(event) !== null && state.hover.point(pointed(event)));
  input.addEventListener("click", (event) => pointed(event) !== null && state.hover.pin(pointed(event)));
  state.hover.listen(follow);

  const pin = () => shown && state.hover.pin(chosen()[0], state.hover.column);
  usableByKeys(heatmap, {
    move: (down, right) => shown && chooseEntry(down, right),
    Enter: pin,
    " ": pin,
    "+": () => shown && view.zoom(1 / ZOOM, ...chosen()),
    "-": () => shown && view.zoom(ZOOM, ...chosen()),
    0: () => view.showAll(),
  });
  usableByKeys(input, {
    move: (down, right) => {
      if (shown) state.hover.move(shown.shape.neighbor(chosen()[0], down, right, overlaidChannel()));
    },
    Enter: pin,
    " ": pin,
  });

  // The entry of the matrix that is pointed at; without one, the largest of the diagonal.
  function chosen() {
    const row = state.hover.row ?? shown.start;
    return [row, state.hover.column ?? row];
  }

  function chooseEntry(down, right) {
    const [row, column] = chosen();
    const inside = (index) => Math.min(Math.max(0, index), shown.rows.size - 1);
    const entry = [inside(row + down), inside(column + right)];
    state.hover.move(...entry);
    view.reveal(...entry);
  }

  const overlaidChannel = () => (shown.shape.isColor ? Number(channel.value) : null);

  async function update(isStale) {
    const { entry, step, sample, classId } = state;
    if (entry.files === false) {
      frame.empty(entry.why_no_files);
      return;
    }
    const which = [entry.run, entry.tag, step, sample, classId];
    const maps = await source.maps(...which);
    if (isStale()) return;
    if (maps.meta.matrix === "none") {
      frame.empty(`There is no matrix for this sample and ${outputWord(entry)}. ${maps.meta.why_no_matrix ?? ""}`);
      return;
    }
    const [input, { arrays, meta }] = await Promise.all([source.input(...which.slice(0, 4)), source.matrix(...which)]);
    if (isStale()) return;
    const matrix = { ...meta, cells: meta.num_cells, values: symmetric(arrays.triangle.data, meta.num_cells) };
    shown = {
      x: input.arrays.x.data,
      shape: new InputShape(input.meta.shape),
      rows: new RowReader(source, which, matrix),
      start: matrix.start, // the row shown until one is pointed at
    };
    frame.clear();
    frame.describe(inWords(entry, state, matrix));
    channelChoice.hidden = !shown.shape.isColor;
    if (shown.shape.isColor && !channel.length)
      channel.append(...["red", "green", "blue"].map((name, i) => el("option", { value: i }, name)));
    view.show(matrix);
    await follow();
  }

  // Shows the row that is pointed at, or else that of the largest diagonal entry.
  async function follow() {
    if (!shown) return;
    const current = shown;
    const { row: pointedRow, column, pinned } = state.hover;
    const [index, at] = chosen();
    view.mark(index, column);
    drawInput();
    let values;
    try {
      values = await current.rows.read(index);
    } catch (error) {
      readout.textContent = error.message;
      return;
    }
    if (values === null || current !== shown) return; // another row has been pointed at since
    const { shape } = current;
    const how = pinned ? "pinned; click again or press Enter to release" : pointedRow === null ? "largest diagonal entry" : "";
    rowTitle.textContent = `row ${index} of the Hessian: ${shape.describe(index)}${how && ` (${how})`}`;
    drawMap(row, values, shape, { kind: "signed", size: MAP, marks: marks(), textColor: charts.color("text") });
    row.dataset.row = index;
    readout.textContent = `H[${index}, ${at}] = ${short(values[at], 5)}   i = ${index}: ${shape.describe(index)};   j = ${at}: ${shape.describe(at)}`;
    Object.assign(readout.dataset, { row: index, column: at, value: values[at] });
  }

  function marks() {
    const { column } = state.hover;
    const [index] = chosen();
    const other = column === null ? [] : [{ index: column, color: charts.color("muted") }];
    return [...other, { index, color: charts.color("accent") }];
  }

  function drawInput() {
    if (!shown) return;
    const { shape, x } = shown;
    const kind = shape.isColor ? "color" : "gray";
    const options = {
      kind,
      size: MAP,
      marks: marks(),
      channel: Number(channel.value),
      textColor: charts.color("text"),
    };
    entryAt = drawMap(input, x, shape, options);
  }

  const key = () => JSON.stringify([state.run, state.sample, state.classId, state.step]);
  return { ...frame, key, update };
}

// Exact rows of one matrix: from the one that is drawn if every entry has its cell, else fetched, one at a time.
class RowReader {
  #waiting = null; // for the row wanted last, while another is being fetched
  #isBusy = false;

  // `which` is [run, tag, step, sample, classId].
  constructor(source, which, { values, size, block }) {
    Object.assign(this, { source, which, values, size, isWhole: block === 1 });
  }

  // The row [D], or null where another row was wanted before this one was fetched.
  async read(index) {
    if (this.isWhole) return this.values.subarray(index * this.size, (index + 1) * this.size);
    if (this.#isBusy) {
      this.#waiting?.(null);
      if (!(await new Promise((resolve) => (this.#waiting = resolve)))) return null;
    }
    this.#isBusy = true;
    try {
      const { arrays } = await this.source.row(...this.which, index);
      return arrays.row.data;
    } finally {
      this.#isBusy = false;
      const next = this.#waiting;
      this.#waiting = null;
      next?.(true);
    }
  }
}

function inWords(entry, { sample, classId }, { source, size, block, limit, largest }) {
  return joined([
    `${entry.target} of ${classTitle(entry, classId)}, sample ${sample}: ${size}×${size} entries in ${entry.target} per input unit².`,
    largest > limit && `Colors end at ±${short(limit)}, the 99th percentile of |H|; the largest |entry| is ${short(largest)}.`,
    block > 1 && `Each cell shows the largest of ${block}×${block} entries; the value under the pointer is exact.`,
    source === "from eigenvectors" && "Reconstructed from its eigenvectors, which are complete.",
    largest === 0 && "It is exactly zero.",
  ]);
}
