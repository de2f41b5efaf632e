// Drawing on a canvas at the screen's resolution: images of packed colors, color bars.

import { TABLES, barGradient, paint } from "./colors.js";
import { short } from "./numbers.js";

// A context whose unit is one CSS pixel; resizes the canvas.
export function prepare(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.imageSmoothingEnabled = false;
  context.font = "11px Roboto, system-ui, sans-serif";
  return context;
}

// A canvas of one pixel per value; `kind` is "signed", "gray", or "color": three channels [3, H, W] as one image.
export function imageOf(values, width, height, low, high, kind) {
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(width, height);
  if (kind === "color") mix(values, pixels.data, low, high);
  else paint(values, pixels, low, high, TABLES[kind]);
  context.putImageData(pixels, 0, 0);
  return canvas;
}

// Low to high of every channel as 0 to 1.
function mix(values, data, low, high) {
  const size = values.length / 3;
  const factor = 255 / Math.max(high - low, 1e-12);
  data.fill(255);
  values.forEach((value, i) => (data[4 * (i % size) + Math.floor(i / size)] = (value - low) * factor));
}

// A color bar below a picture, labeled at its ends and middle.
export function horizontalBar(context, x, y, width, low, high, kind, color) {
  context.fillStyle = barGradient(context, x, 0, x + width, 0, kind);
  context.fillRect(x, y, width, 8);
  context.fillStyle = color;
  context.textBaseline = "top";
  const labels = [
    [low, x, "left"],
    [(low + high) / 2, x + width / 2, "center"],
    [high, x + width, "right"],
  ];
  for (const [value, at, align] of labels) {
    context.textAlign = align;
    context.fillText(short(value, 2), at, y + 11);
  }
}

export function range(values) {
  let low = Infinity;
  let high = -Infinity;
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return low <= high ? [low, high] : [0, 0];
}

export function largestMagnitude(values) {
  const [low, high] = range(values);
  return Math.max(Math.abs(low), Math.abs(high));
}
