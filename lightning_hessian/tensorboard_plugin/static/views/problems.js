// All problems at the step shown: one row per sample and class, sortable; a click selects.

import { el, panel } from "../dom.js";
import { percent, short } from "../numbers.js";
import { className } from "../state.js";

const number = (digits) => ({ cell: (value) => short(value, digits), numeric: true });
const uncertain = {
  cell: ([value, error, open]) =>
    short(value) + (error > 0 ? ` ± ${short(error, 1)}` : "") + (open ? " not converged" : ""),
  numeric: true,
  order: ([value]) => value,
};
const share = {
  ...uncertain,
  cell: ([value, error]) => percent(value) + (error > 0 ? ` ± ${short(100 * error, 1)} %` : ""),
};

// Key, heading, how a cell is written and ordered.
const COLUMNS = [
  ["sample", "sample", number(6)],
  ["class", "class", {}],
  ["label", "label", {}],
  ["predicted", "predicted", {}],
  ["lambda_max", "λ max", uncertain],
  ["lambda_min", "λ min", uncertain],
  ["trace", "trace", uncertain],
  ["normalized_curvature", "normalized curvature", uncertain],
  ["linear_radius", "linear radius", uncertain],
  ["gauss_newton_share", "head share", share],
  ["top_eigenvector_cosine", "drift |cos|", uncertain],
  ["top_subspace_overlap", "drift overlap", uncertain],
  ["method", "method", {}],
  ["engine", "engine", {}],
  ["diagnosis", "diagnosis", {}],
];

export function problems({ state, source }) {
  const frame = panel(
    "problems",
    "All samples and classes at this step",
    "Click a heading to sort, a row to look at it.",
  );
  let order = { key: "sample", sign: 1 };
  let rows = [];

  async function update(isStale) {
    const { entry, step } = state;
    const answer = await source.summary(entry.run, entry.tag, step);
    if (isStale()) return;
    rows = rowsOf(entry, answer);
    frame.clear();
    const open = rows.filter(({ lambda_max: [, , high], lambda_min: [, , low] }) => high || low).length;
    frame.tell(
      `${rows.length} problems at step ${step} (${answer.meta.moment}).` +
        (open ? ` In ${open} of them an extreme eigenvalue has not converged.` : ""),
    );
    draw();
  }

  function draw() {
    const [, , how] = COLUMNS.find(([key]) => key === order.key);
    const value = (row) => (how.order ?? ((each) => each))(row[order.key]);
    const sorted = [...rows].sort((a, b) => order.sign * compare(value(a), value(b)));
    const head = COLUMNS.map(([key, title]) =>
      el(
        "th",
        { "aria-sort": key !== order.key ? "none" : order.sign > 0 ? "ascending" : "descending" },
        el(
          "button",
          { type: "button", "data-sort": key, onclick: () => sort(key) },
          title,
          key === order.key ? (order.sign > 0 ? " ▲" : " ▼") : "",
        ),
      ),
    );
    const body = sorted.map((row) => {
      const selected = row.sample === state.sample && row.column === state.columnIndex;
      const cells = COLUMNS.map(([key, , { cell = String, numeric }]) =>
        el("td", { className: numeric ? "number" : "", "data-key": key }, cell(row[key] ?? "")),
      );
      const line = el(
        "tr",
        {
          tabIndex: 0,
          className: selected ? "selected" : "",
          "data-sample": row.sample,
          "data-column": row.column,
          onclick: () => select(row),
        },
        ...cells,
      );
      line.addEventListener("keydown", ({ key }) => key === "Enter" && select(row));
      return line;
    });
    frame.body.replaceChildren(el("table", {}, el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...body)));
  }

  function sort(key) {
    order = { key, sign: order.key === key ? -order.sign : 1 };
    draw();
  }

  const select = ({ sample, column }) => state.set({ sample, column: state.entry.columns[column] });
  const key = () => JSON.stringify([state.run, state.step, state.sample, state.column]);
  return { ...frame, key, update };
}

function compare(a, b) {
  if (typeof a === "string") return a.localeCompare(b, undefined, { numeric: true });
  if (Number.isNaN(a)) return Number.isNaN(b) ? 0 : 1;
  return Number.isNaN(b) ? -1 : a - b || 0; // two infinities are equal
}

function rowsOf(entry, { arrays, meta }) {
  const [samples, columns] = arrays.lambda_max.shape;
  const name = (array, index) => (array ? className(entry, array.data[index]) : "unknown");
  return Array.from({ length: samples * columns }, (_, place) => {
    const sample = Math.floor(place / columns);
    const ends = { high: extreme(arrays, "lambda_max", place), low: extreme(arrays, "lambda_min", place) };
    const [norm, residual, open] = Math.abs(ends.low[0]) > Math.abs(ends.high[0]) ? ends.low : ends.high;
    const relative = norm ? residual / Math.abs(norm) : 0; // to first order the same of what max |λ| divides or is divided by
    const isOpen = ends.high[2] || ends.low[2];
    const at = (key) => arrays[key].data[place];
    return {
      sample,
      column: place % columns,
      class: name(arrays.classes, place),
      label: name(arrays.labels, sample),
      predicted: name(arrays.predicted, sample),
      lambda_max: ends.high,
      lambda_min: ends.low,
      trace: [arrays.trace.data[place], arrays.trace_error?.data[place] ?? 0, false],
      normalized_curvature: [at("normalized_curvature"), at("normalized_curvature") * relative, open],
      linear_radius: [at("linear_radius"), at("linear_radius") * relative, open],
      gauss_newton_share: [at("gauss_newton_share"), arrays.gauss_newton_share_error?.data[place] ?? 0, false],
      top_eigenvector_cosine: [at("top_eigenvector_cosine"), 0, isOpen],
      top_subspace_overlap: [at("top_subspace_overlap"), 0, isOpen],
      method: meta.method,
      engine: meta.engine.replaceAll("_", " "),
      diagnosis: meta.diagnosis.replaceAll("_", " "),
    };
  });
}

// An extreme eigenvalue with the residual of the listed one that it is, and whether that has not converged.
function extreme(arrays, metric, place) {
  const value = arrays[metric].data[place];
  const { eigenvalues, residuals, converged } = arrays;
  const width = eigenvalues.shape[2];
  for (let i = place * width; i < (place + 1) * width; i++) {
    if (eigenvalues.data[i] === value) return [value, residuals.data[i], !converged.data[i]];
  }
  return [value, 0, false]; // zero, which a complete spectrum of low rank does not list
}
