// What is selected. Views read it and set it; nobody else keeps a selection.

const DEFAULTS = { runs: [], run: null, column: null, sample: 0, step: null, metric: "lambda_max", lines: "spread" };

export class State {
  #listeners = [];
  #asked = { ...DEFAULTS };

  constructor(asked = {}) {
    this.catalog = [];
    this.unreadable = []; // why the rest of the runs cannot be shown, in sentences
    this.hover = new Hover();
    this.#asked = { ...DEFAULTS, ...asked };
    this.#settle();
  }

  listen(listener) {
    this.#listeners.push(listener);
  }

  // Changes what is asked for; what does not exist becomes the nearest that does.
  set(changes) {
    const hovering = ["run", "column", "sample"].some((name) => name in changes);
    if (hovering) this.hover.clear();
    Object.assign(this.#asked, changes);
    this.#settle();
    this.#tell();
  }

  // Takes the answer to runs().
  setCatalog({ runs }) {
    const all = runs.flatMap(({ run, tags }) =>
      tags.map((tag) => ({ ...tag, run, id: JSON.stringify([run, tag.tag]) })),
    );
    this.catalog = all.filter(({ error }) => !error);
    this.unreadable = all.filter(({ error }) => error).map(({ error }) => error);
    this.catalog.forEach((entry, index) => Object.assign(entry, { index, label: label(entry) }));
    this.#settle();
    this.#tell();
  }

  // The selection as short strings, for a URL.
  toParameters() {
    const { runs, run, column, sample, metric, lines } = this;
    const parameters = { runs: JSON.stringify(runs), column, sample, metric, lines };
    if (run) parameters.run = run;
    if (!this.atEnd) parameters.step = this.step;
    return Object.fromEntries(Object.entries(parameters).map(([name, value]) => [name, String(value)]));
  }

  static fromParameters({ runs, run, column, sample, step, metric, lines }) {
    const asked = { run, column, metric, lines, sample: sample && Number(sample), step: step && Number(step) };
    try {
      asked.runs = runs && JSON.parse(runs);
    } catch {
      // a link cut short: the rest of it still holds
    }
    return Object.fromEntries(Object.entries(asked).filter(([, value]) => value !== undefined && value !== ""));
  }

  #settle() {
    const asked = this.#asked;
    const known = new Map(this.catalog.map((entry) => [entry.id, entry]));
    this.runs = Array.isArray(asked.runs) ? asked.runs.filter((id) => known.has(id)) : [];
    if (!this.runs.length && this.catalog.length) this.runs = this.catalog.map(({ id }) => id).slice(0, 6);
    this.run = this.runs.includes(asked.run) ? asked.run : (this.runs[0] ?? null);
    this.entry = known.get(this.run) ?? null;
    this.entries = this.runs.map((id) => known.get(id));
    this.metric = asked.metric;
    this.lines = asked.lines;
    this.steps = this.entry?.steps ?? [];
    this.column = this.entry?.columns.includes(asked.column) ? asked.column : (this.entry?.columns[0] ?? null);
    this.columnIndex = this.entry ? this.entry.columns.indexOf(this.column) : 0;
    this.sample = Math.min(Math.max(0, asked.sample | 0), Math.max(0, (this.entry?.num_samples ?? 1) - 1));
    this.stepIndex = asked.step === null ? this.steps.length - 1 : nearest(this.steps, asked.step);
    this.step = this.steps[this.stepIndex] ?? null;
    this.atEnd = asked.step === null;
  }

  // The step shown; the last one means: whichever is last, so that the page follows a run that goes on.
  setStepIndex(index) {
    this.set({ step: index >= this.steps.length - 1 ? null : this.steps[index] });
  }

  #tell() {
    this.#listeners.forEach((listener) => listener(this));
  }
}

// Which two input entries the pointer is at: `row` is kept until another is pointed at, `pinned` until it is let go.
class Hover {
  #listeners = [];
  row = null;
  column = null;
  pinned = false;

  listen(listener) {
    this.#listeners.push(listener);
  }

  point(row, column = null) {
    if (this.pinned || (row === this.row && column === this.column)) return;
    this.#set(row, column, false);
  }

  pin(row) {
    const same = this.pinned && row === this.row;
    this.#set(row, null, !same);
  }

  clear() {
    this.#set(null, null, false);
  }

  #set(row, column, pinned) {
    Object.assign(this, { row, column, pinned });
    this.#listeners.forEach((listener) => listener(this));
  }
}

function nearest(steps, step) {
  let best = 0;
  steps.forEach((each, index) => {
    if (Math.abs(each - step) < Math.abs(steps[best] - step)) best = index;
  });
  return best;
}

function label({ run, name, target }) {
  return [run === "." ? "this directory" : run, name, target].filter(Boolean).join(" · ");
}

// The class looked at in one column, in words.
export function columnTitle(entry, column) {
  const match = /^class_(\d+)$/.exec(column);
  if (!match) return column;
  const known = entry.class_names?.[Number(match[1])];
  return known ? `class ${match[1]}: ${known}` : `class ${match[1]}`;
}

// The number of a class with its name, where it has one.
export function className(entry, number) {
  return entry.class_names?.[number] ?? String(number);
}
