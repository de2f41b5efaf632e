// Every sample and class at the step shown: one row each, sortable; a click selects.

import { el, named, panel } from "../dom.js";
import { joined, short } from "../numbers.js";
import { outputName, outputWord, plural } from "../state.js";

const PAGE = 50; // rows
const number = (digits) => ({ cell: (value) => short(value, digits), numeric: true });
const NOT_VALID = "not valid";
const UNKNOWN = "unknown";
const VISIBLE = 5e-4; // relative: a smaller error is less than half of the last of three digits
const metricCell = {
  cell: ({ value, error, isOpen, isValid }) =>
    isValid ? short(value) + (error > VISIBLE * Math.abs(value) ? ` ± ${short(error, 1)}` : "") + (isOpen ? " not converged" : "") : NOT_VALID,
  numeric: true,
  order: ({ value }) => value,
};
const validity = {
  cell: ({ error, isValid, agreement }) => {
    if (Number.isNaN(error)) return isValid ? "not confirmed at this step" : NOT_VALID;
    const words = `${error <= agreement ? "agrees to" : "differs by"} ${short(error, 1)}`;
    return isValid ? words : `${NOT_VALID}: ${words}`;
  },
  order: ({ error }) => error,
};

export function table({ state, source }) {
  const frame = panel("table", "All samples and classes at this step", "Click a heading to sort, or a row to select it. Errors (±) are given where they reach the digits shown.");
  const where = el("output", { ...named("table-rows") });
  const turn = (label, to) => el("button", { type: "button", "aria-label": label, onclick: () => draw(to()) }, label);
  const pager = el(
    "div",
    { className: "row pager" },
    turn("first", () => 0),
    turn("previous", () => page - 1),
    where,
    turn("next", () => page + 1),
    turn("last", () => Infinity),
  );
  frame.head.append(pager);
  let order = { key: "sample", sign: 1 };
  let rows = [];
  let page = 0;
  let shownSelection = null; // for which the page was last turned

  const isRegression = () => state.entry.has_classes === false;
  const hasLabels = () => !isRegression() || rows.some(({ label }) => label !== UNKNOWN);

  // Key, heading, how a cell is written and ordered.
  const columns = () => [
    ["sample", "sample", number(6)],
    ["class", outputWord(state.entry), {}],
    ...(hasLabels() ? [["label", "label", {}]] : []),
    ...(isRegression() ? [] : [["predicted", "predicted", {}]]),
    ["validity", "finite differences", validity],
    ...state.metrics.filter(({ is_logged: isLogged }) => isLogged).map(({ name, title }) => [name, title, metricCell]),
  ];

  async function update(isStale) {
    const { entry, step, stepIndex } = state;
    const series = await source.series(entry.run, entry.tag);
    if (isStale()) return;
    rows = rowsOf(entry, series, stepIndex, state.metrics);
    frame.clear();
    frame.rename(`All samples and ${plural(outputWord(entry))} at this step`);
    const about = (name) => series.meta[name][stepIndex].replaceAll("_", " ");
    const open = rows.filter(({ lambda_max: high, lambda_min: low }) => high.isOpen || low.isOpen).length;
    const invalid = rows.filter(({ validity: { isValid } }) => !isValid).length;
    frame.describe(
      joined([
        `Step ${step} (${series.meta.when[stepIndex]}). Method: ${about("method")}, ${about("autodiff_mode")}. Diagnosis: ${about("diagnosis")}.`,
        open && `For ${open} of the ${rows.length} rows, an extreme eigenvalue has not converged.`,
        invalid && `${invalid} of the ${rows.length} rows ${invalid === 1 ? "is" : "are"} not valid: the diagnosis below says why.`,
      ]),
    );
    draw();
  }

  // Draws a page; by default that of a new selection, or else the same.
  function draw(wanted = null) {
    const shown = columns();
    const [, , how] = shown.find(([key]) => key === order.key) ?? shown[0]; // of another run
    const value = (row) => (how.order ?? ((each) => each))(row[order.key]);
    const sorted = [...rows].sort((a, b) => order.sign * compare(value(a), value(b)));
    const selection = JSON.stringify([state.run, state.sample, state.classId]);
    const isAsked = wanted !== null;
    const turned = !isAsked && selection !== shownSelection;
    if (turned) wanted = Math.floor(sorted.findIndex(isSelected) / PAGE);
    shownSelection = selection;
    const lastPage = Math.max(0, Math.ceil(sorted.length / PAGE) - 1);
    page = Math.min(Math.max(0, wanted ?? page), lastPage);
    const start = page * PAGE;
    pager.hidden = !lastPage;
    where.textContent = `rows ${start + 1} to ${Math.min(start + PAGE, sorted.length)} of ${sorted.length}`;
    const head = shown.map(([key, title]) =>
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
    const body = sorted.slice(start, start + PAGE).map((row) => lineOf(row, shown));
    frame.body.replaceChildren(el("table", {}, el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...body)));
    if (isAsked) frame.body.scrollTop = 0;
    const own = turned && frame.body.querySelector("tr.selected");
    const { scrollTop: top, clientHeight: height } = frame.body;
    if (own && (own.offsetTop < top || own.offsetTop + own.offsetHeight > top + height)) {
      frame.body.scrollTop = own.offsetTop - height / 2;
    }
  }

  function lineOf(row, shown) {
    const cells = shown.map(([key, , { cell = String, numeric }]) =>
      el("td", { className: numeric ? "number" : "", "data-key": key }, cell(row[key] ?? "")),
    );
    const line = el(
      "tr",
      {
        tabIndex: 0,
        className: isSelected(row) ? "selected" : "",
        "data-sample": row.sample,
        "data-class-id": row.classId,
        onclick: () => select(row),
      },
      ...cells,
    );
    line.addEventListener("keydown", ({ key }) => key === "Enter" && select(row));
    return line;
  }

  function sort(key) {
    order = { key, sign: order.key === key ? -order.sign : 1 };
    draw(0);
  }

  const isSelected = ({ sample, classId }) => sample === state.sample && classId === state.classId;
  const select = ({ sample, classId }) => state.set({ sample, classId });
  const key = () => JSON.stringify([state.run, state.step, state.sample, state.classId, state.steps.length]);
  return { ...frame, key, update };
}

function compare(a, b) {
  if (typeof a === "string") return a.localeCompare(b, undefined, { numeric: true });
  if (Number.isNaN(a)) return Number.isNaN(b) ? 0 : 1;
  return Number.isNaN(b) ? -1 : a - b || 0; // two infinities are equal
}

function rowsOf(entry, { arrays, meta }, step, metrics) {
  const { num_samples: samples, class_ids: ids } = entry;
  const output = (array, index) => (array?.data[index] >= 0 ? outputName(entry, array.data[index]) : UNKNOWN);
  return Array.from({ length: samples * ids.length }, (_, row) => {
    const sample = Math.floor(row / ids.length);
    const index = step * samples * ids.length + row;
    const isValid = arrays.valid.data[index] !== 0;
    const metric = (name) => ({
      value: arrays[name]?.data[index] ?? NaN,
      error: arrays[`${name}_error`]?.data[index] ?? 0,
      isOpen: arrays[`${name}_converged`]?.data[index] === 0,
      isValid,
    });
    return {
      sample,
      classId: ids[row % ids.length],
      class: output(arrays.classes, index),
      label: output(arrays.labels, step * samples + sample),
      predicted: output(arrays.predicted, step * samples + sample),
      ...Object.fromEntries(metrics.map(({ name }) => [name, metric(name)])),
      validity: { error: arrays.finite_difference_error.data[index], isValid, agreement: meta.agreement },
    };
  });
}
