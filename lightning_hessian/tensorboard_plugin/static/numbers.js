// Numbers as text, and the signed logarithmic axis.

const SUPERSCRIPTS = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };

// Three digits (or `digits`), with a true minus sign.
export function short(value, digits = 3) {
  if (value === undefined || Number.isNaN(value)) return "undefined";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  const size = Math.abs(value);
  const plain = size === 0 || (size >= 1e-3 && size < 1e5);
  const text = plain ? String(Number(value.toPrecision(digits))) : value.toExponential(digits - 1).replace("e+", "e");
  return text.replaceAll("-", "−");
}

// Those parts of a text that there are.
export const joined = (parts, separator = " ") => parts.filter(Boolean).join(separator);

export const percent = (share) => (Number.isFinite(share) ? `${Math.round(100 * share)} %` : "undefined");

// Between neighbors of numbers in ascending order, as numpy does.
export function quantile(sorted, share) {
  const rank = share * (sorted.length - 1);
  const below = Math.floor(rank);
  return sorted[below] + (rank - below) * (sorted[Math.min(below + 1, sorted.length - 1)] - sorted[below]);
}

const superscript = (number) => [...String(number)].map((sign) => SUPERSCRIPTS[sign]).join("");

// The histograms' own axis: a value is at ±(12 + log10 |λ|), in bins of this width.
const SMALLEST_DECADE = -12;
const BIN_WIDTH = 40 / 64;
const SHOWN_DECADES = [2, 8]; // at least and at most
const MIDDLE = 0.5; // half the width for everything too close to zero

// An axis that is logarithmic on both sides of zero, starting at the smallest magnitude (but not too far below the largest);
// everything nearer to zero shares the middle, which ends at an edge of the histograms' bins. `position` gives that of a
// value, `edgePosition` that of such an edge (null: inside the middle).
export function signedLog(smallest, largest) {
  const top = Math.log10(Math.max(largest, 1e-11)) - SMALLEST_DECADE;
  const wanted = Math.log10(largest / smallest) + 0.5;
  const decades = Math.min(Math.max(wanted, SHOWN_DECADES[0]), SHOWN_DECADES[1]);
  const cut = BIN_WIDTH * Math.max(1, Math.floor((top - decades) / BIN_WIDTH));
  const out = (sign, distance) => sign * (MIDDLE + distance - cut);
  const position = (value) => {
    const distance = Math.log10(Math.abs(value)) - SMALLEST_DECADE;
    return distance > cut ? out(Math.sign(value), distance) : 0;
  };
  const edgePosition = (edge) => (Math.abs(edge) < cut - 1e-9 ? null : out(Math.sign(edge), Math.abs(edge)));
  const stride = decades > 5 ? 2 : 1;
  const lowest = Math.ceil(cut + SMALLEST_DECADE + 0.2 * decades - 0.2); // clear of the label in the middle
  const largestDecade = Math.ceil(top + SMALLEST_DECADE);
  const values = [0];
  const text = [`|λ| ≤ ${short(10 ** (cut + SMALLEST_DECADE), 1)}`];
  for (let decade = largestDecade; decade >= lowest; decade -= stride) {
    values.push(out(1, decade - SMALLEST_DECADE), out(-1, decade - SMALLEST_DECADE));
    text.push(`10${superscript(decade)}`, `−10${superscript(decade)}`);
  }
  const reach = out(1, largestDecade - SMALLEST_DECADE) + BIN_WIDTH / 2;
  return { position, edgePosition, middle: MIDDLE, reach, ticks: { values, text } };
}

// Round numbers between low and high, about `count` of them.
export function niceTicks(low, high, count) {
  const raw = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = Math.max(1, power * [1, 2, 5, 10].find((factor) => factor * power >= raw));
  const ticks = [];
  for (let tick = Math.ceil(low / step) * step; tick <= high; tick += step) ticks.push(tick);
  return ticks;
}
