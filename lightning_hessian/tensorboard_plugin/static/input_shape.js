// The input's shape: how the D entries of one sample are arranged in a picture, and pictures of one value per entry.

import { imageOf, largestMagnitude, horizontalBar, prepare, range } from "./canvas.js";
import { short } from "./numbers.js";

const BAR = 26;
const LINE_HEIGHT = 120;
const GAP = 1; // cells between channels that are side by side

// Leading axes (channels) side by side; one axis alone is a line.
export class InputShape {
  constructor(shape) {
    this.shape = shape;
    this.isLine = shape.length < 2;
    this.height = this.isLine ? 1 : shape.at(-2);
    this.width = shape.at(-1) ?? 1;
    this.channels = shape.slice(0, -2).reduce((product, length) => product * length, 1);
    this.isColor = shape.length === 3 && shape[0] === 3;
    this.across = this.channels * (this.width + GAP) - GAP;
  }

  // The position of an entry, in words.
  describe(index) {
    if (this.isLine) return `entry ${index}`;
    const [channel, row, column] = this.#split(index);
    const position = `row ${row}, column ${column}`;
    return this.channels > 1 ? `channel ${channel}, ${position}` : position;
  }

  // The cell of an entry, with channels side by side or (`overlaid`) on top of each other.
  cell(index, overlaid = false) {
    const [channel, row, column] = this.#split(index);
    return [row, column + (overlaid ? 0 : channel * (this.width + GAP))];
  }

  // The entry of a cell, or null outside the picture.
  entry(row, column, channel = null) {
    if (row < 0 || row >= this.height || column < 0) return null;
    const stride = this.width + GAP;
    const plane = channel ?? Math.floor(column / stride);
    const within = channel === null ? column - plane * stride : column;
    if (within >= this.width || plane >= this.channels) return null;
    return (plane * this.height + row) * this.width + within;
  }

  // The entry so many cells below and to the right, or the last before the edge. From channel to channel where they are
  // side by side; else within `channel`.
  neighbor(index, down, right, channel = null) {
    const [plane, row, column] = this.#split(index);
    const inside = (at, length) => Math.min(Math.max(0, at), length - 1);
    const start = (channel === null ? plane : 0) * this.width;
    const across = inside(start + column + right, (channel === null ? this.channels : 1) * this.width);
    const to = channel ?? Math.floor(across / this.width);
    return (to * this.height + inside(row + down, this.height)) * this.width + (across % this.width);
  }

  // Values side by side, the gaps not a number.
  spreadOut(values) {
    if (this.channels === 1) return values;
    const out = new Float32Array(this.height * this.across).fill(NaN);
    for (let channel = 0; channel < this.channels; channel++) {
      for (let row = 0; row < this.height; row++) {
        const start = (channel * this.height + row) * this.width;
        out.set(values.subarray(start, start + this.width), row * this.across + channel * (this.width + GAP));
      }
    }
    return out;
  }

  #split(index) {
    const plane = this.height * this.width;
    const within = index % plane;
    return [Math.floor(index / plane), Math.floor(within / this.width), within % this.width];
  }
}

// Draws one value per input entry. `kind`: "signed" (symmetric colors), "gray" or "color" (three channels as one).
// Gives `entryAt(event)`, the entry below the pointer.
export function drawMap(canvas, values, shape, { kind, size, marks = [], channel = 0, textColor }) {
  return shape.isLine
    ? drawLine(canvas, values, { size, marks, textColor })
    : drawImage(canvas, values, shape, { kind, size, marks, channel, textColor });
}

function drawImage(canvas, values, shape, { kind, size, marks, channel, textColor }) {
  const overlaid = kind === "color";
  const [rows, columns] = [shape.height, overlaid ? shape.width : shape.across];
  const cell = Math.min(size / rows, (overlaid || shape.channels === 1 ? size : 2 * size) / columns);
  const width = Math.max(columns * cell, 40);
  const height = Math.max(rows * cell, 12);
  const limit = largestMagnitude(values) || 1;
  const [low, high] = kind === "signed" ? [-limit, limit] : range(values);
  const context = prepare(canvas, Math.max(width, 110), height + BAR);
  const image = imageOf(overlaid ? values : shape.spreadOut(values), columns, rows, low, high, kind);
  context.drawImage(image, 0, 0, width, height);
  const isZero = kind === "signed" && largestMagnitude(values) === 0;
  if (overlaid || isZero) {
    context.fillStyle = textColor;
    context.textBaseline = "top";
    context.fillText(isZero ? "exactly zero" : `${short(low, 2)} to ${short(high, 2)} shown as 0 to 1`, 0, height + 6);
  } else {
    horizontalBar(context, 0, height + 4, width, low, high, kind, textColor);
  }
  const [wide, tall] = [width / columns, height / rows];
  for (const { index, color } of marks) {
    const [row, column] = shape.cell(index, overlaid);
    frame(context, column * wide, row * tall, wide, tall, color);
  }
  return (event) => {
    const row = Math.floor(event.offsetY / tall);
    const column = Math.floor(event.offsetX / wide);
    return shape.entry(row, column, overlaid ? channel : null);
  };
}

function frame(context, x, y, width, height, color) {
  for (const [outset, lineWidth, style] of [
    [1.5, 4, "#fff"],
    [1.5, 2, color],
  ]) {
    context.strokeStyle = style;
    context.lineWidth = lineWidth;
    context.strokeRect(x - outset, y - outset, width + 2 * outset, height + 2 * outset);
  }
}

function drawLine(canvas, values, { size, marks, textColor }) {
  const context = prepare(canvas, size, LINE_HEIGHT + BAR);
  const limit = largestMagnitude(values) || 1;
  const across = (i) => ((i + 0.5) / values.length) * size;
  const up = (value) => (LINE_HEIGHT / 2) * (1 - (0.95 * value) / limit);
  for (const { index, color } of marks) {
    context.fillStyle = color;
    context.fillRect(across(index) - 1, 0, 2, LINE_HEIGHT);
  }
  context.strokeStyle = "#888";
  context.strokeRect(0.5, 0.5, size - 1, LINE_HEIGHT - 1);
  context.beginPath();
  context.moveTo(0, LINE_HEIGHT / 2);
  context.lineTo(size, LINE_HEIGHT / 2);
  context.stroke();
  context.strokeStyle = context.fillStyle = "#3182bd";
  context.lineWidth = 1.5;
  context.beginPath();
  values.forEach((value, i) => context.lineTo(across(i), up(value)));
  context.stroke();
  if (values.length <= 64) values.forEach((value, i) => context.fillRect(across(i) - 2, up(value) - 2, 4, 4));
  context.fillStyle = textColor;
  context.textBaseline = "top";
  context.fillText(`entries 0 to ${values.length - 1}, ±${short(limit, 2)}`, 0, LINE_HEIGHT + 6);
  return (event) => {
    const index = Math.floor((event.offsetX / size) * values.length);
    return index >= 0 && index < values.length ? index : null;
  };
}
