// Colors: red is positive, blue is negative, white is zero.

const STOPS = {
  // ColorBrewer's RdBu reversed, the scale of the package's other pictures.
  signed: [
    [5, 48, 97],
    [33, 102, 172],
    [67, 147, 195],
    [146, 197, 222],
    [209, 229, 240],
    [247, 247, 247],
    [253, 219, 199],
    [244, 165, 130],
    [214, 96, 77],
    [178, 24, 43],
    [103, 0, 31],
  ],
  gray: [
    [0, 0, 0],
    [255, 255, 255],
  ],
};
const MISSING = [150, 150, 150]; // not a number

const LEVELS = 256;

function table(stops) {
  const packed = new Uint32Array(LEVELS);
  for (let level = 0; level < LEVELS; level++) {
    const at = (level / (LEVELS - 1)) * (stops.length - 1);
    const below = Math.min(Math.floor(at), stops.length - 2);
    packed[level] = pack(stops[below].map((value, i) => value + (at - below) * (stops[below + 1][i] - value)));
  }
  return packed;
}

const pack = ([red, green, blue]) =>
  ((255 << 24) | (Math.round(blue) << 16) | (Math.round(green) << 8) | Math.round(red)) >>> 0;

export const TABLES = { signed: table(STOPS.signed), gray: table(STOPS.gray) };
const MISSING_PACKED = pack(MISSING);

// Colors of `values` between low and high, as packed RGBA of an ImageData.
export function paint(values, pixels, low, high, colors) {
  const packed = new Uint32Array(pixels.data.buffer);
  const factor = high > low ? (LEVELS - 1) / (high - low) : 0;
  for (let i = 0; i < values.length; i++) {
    const level = (values[i] - low) * factor + 0.5;
    packed[i] = Number.isNaN(level)
      ? MISSING_PACKED
      : colors[level < 0 ? 0 : level >= LEVELS ? LEVELS - 1 : level | 0];
  }
}

// A horizontal or vertical gradient for a color bar.
export function barGradient(context, x0, y0, x1, y1, kind) {
  const gradient = context.createLinearGradient(x0, y0, x1, y1);
  const stops = STOPS[kind];
  stops.forEach((stop, i) => gradient.addColorStop(i / (stops.length - 1), `rgb(${stop.join(",")})`));
  return gradient;
}

// One color for each line of a chart.
const LINES = [
  "#1f77b4",
  "#ff7f0e",
  "#2ca02c",
  "#d62728",
  "#9467bd",
  "#8c564b",
  "#e377c2",
  "#17becf",
  "#bcbd22",
  "#7f7f7f",
];
export const lineColor = (index) => LINES[index % LINES.length];
export const faded = (color, opacity) =>
  `rgba(${[1, 3, 5].map((start) => parseInt(color.slice(start, start + 2), 16)).join(",")},${opacity})`;
