// A matrix on a canvas: diverging colors, color bar, axes. The wheel or a dragged square zooms, a double-click shows all.

import { barGradient, faded } from "./colors.js";
import { imageOf, prepare } from "./canvas.js";
import { niceTicks, short } from "./numbers.js";

const LEFT = 52;
const TOP = 8;
const BOTTOM = 40;
const RIGHT = 100;
const SMALLEST_VIEW = 4; // entries across
export const ZOOM = Math.exp(0.2); // by one notch of the wheel

export class MatrixView {
  #matrix = null;
  #view = null; // first row, first column, entries across, of what is shown
  #drag = null;
  #mark = null;
  #scheduled = false;

  // `point(row, column)` is called as the pointer moves, with null outside the matrix; `pick(row)` on a click.
  constructor(canvas, { side, color, point, pick }) {
    Object.assign(this, { canvas, side, color, point, pick });
    canvas.addEventListener("pointermove", (event) => this.#move(event));
    canvas.addEventListener("pointerleave", () => this.point(null, null));
    canvas.addEventListener("pointerdown", (event) => this.#press(event));
    canvas.addEventListener("pointerup", (event) => this.#release(event));
    canvas.addEventListener("dblclick", () => this.showAll());
    canvas.addEventListener("wheel", (event) => this.#wheel(event), { passive: false });
  }

  // `values` [cells, cells] of a matrix of `size`, each cell standing for a block of entries.
  show({ values, cells, size, block, limit, largest }) {
    const scale = limit || largest || 1;
    const image = imageOf(values, cells, cells, -scale, scale, "signed");
    const same = this.#matrix?.size === size;
    this.#matrix = { image, size, block, limit: scale, clipped: largest > scale };
    if (!same) this.#view = { row: 0, column: 0, across: size };
    this.draw();
  }

  mark(row, column) {
    this.#mark = row === null ? null : { row, column };
    this.draw();
  }

  // Moves a zoomed view no farther than it takes to show an entry.
  reveal(row, column) {
    const { row: top, column: left, across } = this.#view;
    const to = (start, index) => Math.min(Math.max(start, index + 1 - across), index);
    this.#show(to(top, row), to(left, column), across);
  }

  // Zooms around an entry, which stays where it is.
  zoom(factor, row, column) {
    this.reveal(row, column);
    const { row: top, column: left, across } = this.#view;
    this.#zoomAt((row + 0.5 - top) / across, (column + 0.5 - left) / across, factor);
  }

  showAll() {
    this.#show(0, 0, this.#matrix?.size);
  }

  draw() {
    if (this.#scheduled || !this.#matrix) return;
    this.#scheduled = true;
    requestAnimationFrame(() => {
      this.#scheduled = false;
      this.#paint();
    });
  }

  #paint() {
    const { image, block } = this.#matrix;
    const { row, column, across } = this.#view;
    const context = prepare(this.canvas, LEFT + this.side + RIGHT, TOP + this.side + BOTTOM);
    context.drawImage(
      image,
      column / block,
      row / block,
      across / block,
      across / block,
      LEFT,
      TOP,
      this.side,
      this.side,
    );
    this.#axes(context);
    this.#bar(context);
    if (this.#mark) this.#cross(context);
    if (this.#drag?.square) {
      const { x, y, length } = this.#drag.square;
      context.strokeStyle = "#000";
      context.fillStyle = "rgba(120,120,120,0.25)";
      context.fillRect(x, y, length, length);
      context.strokeRect(x, y, length, length);
    }
  }

  #axes(context) {
    const { row, column, across } = this.#view;
    const scale = this.side / across;
    context.strokeStyle = this.color("muted");
    context.fillStyle = this.color("text");
    context.strokeRect(LEFT - 0.5, TOP - 0.5, this.side + 1, this.side + 1);
    context.textAlign = "center";
    context.textBaseline = "top";
    for (const tick of niceTicks(column, column + across - 1, 6)) {
      const x = LEFT + (tick + 0.5 - column) * scale;
      context.fillRect(x, TOP + this.side, 1, 4);
      context.fillText(tick, x, TOP + this.side + 6);
    }
    context.fillText("input entry j (row-major)", LEFT + this.side / 2, TOP + this.side + 23);
    context.textAlign = "right";
    context.textBaseline = "middle";
    for (const tick of niceTicks(row, row + across - 1, 6)) {
      const y = TOP + (tick + 0.5 - row) * scale;
      context.fillRect(LEFT - 4, y, 4, 1);
      context.fillText(tick, LEFT - 6, y);
    }
    context.save();
    context.translate(9, TOP + this.side / 2);
    context.rotate(-Math.PI / 2);
    context.textAlign = "center";
    context.fillText("input entry i", 0, 0);
    context.restore();
  }

  #bar(context) {
    const { limit, clipped } = this.#matrix;
    const x = LEFT + this.side + 14;
    context.fillStyle = barGradient(context, 0, TOP + this.side, 0, TOP, "signed");
    context.fillRect(x, TOP, 12, this.side);
    context.strokeStyle = this.color("muted");
    context.strokeRect(x, TOP, 12, this.side);
    context.fillStyle = this.color("text");
    context.textAlign = "left";
    context.textBaseline = "middle";
    const labels = [
      [`${clipped ? "≥ " : ""}${short(limit, 2)}`, 0],
      ["0", 0.5],
      [`${clipped ? "≤ " : ""}${short(-limit, 2)}`, 1],
    ];
    for (const [text, down] of labels) context.fillText(text, x + 17, TOP + 6 + down * (this.side - 12));
  }

  #cross(context) {
    const { row, column, across } = this.#view;
    const scale = this.side / across;
    const thickness = Math.max(1, scale);
    const accent = this.color("accent");
    context.save();
    context.beginPath();
    context.rect(LEFT, TOP, this.side, this.side);
    context.clip();
    context.fillStyle = faded(accent, 0.7);
    context.strokeStyle = accent;
    context.lineWidth = 2;
    const band = scale > 6 ? "strokeRect" : "fillRect"; // around cells that can be seen, their colors left as they are
    context[band](LEFT, TOP + (this.#mark.row - row) * scale, this.side, thickness);
    if (this.#mark.column !== null) {
      context[band](LEFT + (this.#mark.column - column) * scale, TOP, thickness, this.side);
    }
    context.restore();
  }

  // The entry below a point on the canvas, or null.
  #entry(x, y) {
    if (!this.#matrix) return null;
    const { row, column, across } = this.#view;
    const [down, right] = [(y - TOP) / this.side, (x - LEFT) / this.side];
    if (down < 0 || down >= 1 || right < 0 || right >= 1) return null;
    return [Math.floor(row + down * across), Math.floor(column + right * across)];
  }

  #move(event) {
    if (this.#drag) {
      const length = Math.min(Math.abs(event.offsetX - this.#drag.x), Math.abs(event.offsetY - this.#drag.y));
      const back = (now, start) => (now < start ? start - length : start);
      const square = { x: back(event.offsetX, this.#drag.x), y: back(event.offsetY, this.#drag.y), length };
      this.#drag.square = length > 4 ? square : null;
      this.draw();
      return;
    }
    this.point(...(this.#entry(event.offsetX, event.offsetY) ?? [null, null]));
  }

  #press(event) {
    if (event.button !== 0 || !this.#entry(event.offsetX, event.offsetY)) return;
    this.canvas.setPointerCapture(event.pointerId);
    this.#drag = { x: event.offsetX, y: event.offsetY, square: null };
  }

  #release() {
    const drag = this.#drag;
    this.#drag = null;
    if (!drag) return;
    if (!drag.square) {
      this.pick(...this.#entry(drag.x, drag.y));
      return;
    }
    const { row, column, across } = this.#view;
    const scale = across / this.side;
    this.#show(
      row + (drag.square.y - TOP) * scale,
      column + (drag.square.x - LEFT) * scale,
      drag.square.length * scale,
    );
  }

  #wheel(event) {
    const entry = this.#entry(event.offsetX, event.offsetY);
    if (!entry) return;
    event.preventDefault();
    const [down, right] = [(event.offsetY - TOP) / this.side, (event.offsetX - LEFT) / this.side];
    this.#zoomAt(down, right, ZOOM ** Math.sign(event.deltaY));
  }

  // Around a point of what is shown, given as shares of its height and width.
  #zoomAt(down, right, factor) {
    const { row, column, across } = this.#view;
    const next = Math.min(this.#matrix.size, Math.max(SMALLEST_VIEW, across * factor));
    this.#show(row + down * (across - next), column + right * (across - next), next);
  }

  #show(row, column, across) {
    if (!this.#matrix) return;
    const { size } = this.#matrix;
    const width = Math.min(size, Math.max(SMALLEST_VIEW, across));
    const inside = (start) => Math.min(Math.max(0, start), size - width);
    this.#view = { row: inside(row), column: inside(column), across: width };
    this.draw();
  }
}
