// What is selected. Views read and set it, and nothing else stores a selection.

import { joined } from "./numbers.js";

const DEFAULTS = { runs: [], run: null, classId: null, sample: 0, step: null, metric: "lambda_max", lines: "spread" };

export class State {
  #listeners = [];
  #wanted = { ...DEFAULTS }; // may not exist (yet); what is shown is the nearest that does

  constructor(wanted = {}) {
    this.catalog = [];
    this.metrics = []; // {name, title, unit, formula, meaning}
    this.unreadable = []; // why the rest of the runs cannot be shown, in sentences
    this.hover = new Hover();
    this.#wanted = { ...DEFAULTS, ...wanted };
    this.#resolve();
  }

  listen(listener) {
    this.#listeners.push(listener);
  }

  // Changes the selection; what does not exist becomes the nearest that does.
  set(changes) {
    const isOther = ["run", "classId", "sample"].some((name) => name in changes);
    if (isOther) this.hover.clear();
    Object.assign(this.#wanted, changes);
    this.#resolve();
    this.#notify();
  }

  // Takes the answer to runs().
  setCatalog({ runs, metrics }) {
    this.metrics = metrics;
    const all = runs.flatMap(({ run, tags }) =>
      tags.map((tag) => ({ ...tag, run, id: JSON.stringify([run, tag.tag]) })),
    );
    this.catalog = all.filter(({ error }) => !error);
    this.unreadable = all.filter(({ error }) => error).map(({ error }) => error);
    this.catalog.forEach((entry, index) => Object.assign(entry, { index, label: label(entry) }));
    this.#resolve();
    this.#notify();
  }

  // The selection as short strings, for a URL.
  toParameters() {
    const { runs, run, classId, sample, metric, lines } = this;
    const parameters = { runs: JSON.stringify(runs), class_id: classId, sample, metric: metric?.name, lines };
    if (run) parameters.run = run;
    if (!this.atEnd) parameters.step = this.step;
    return Object.fromEntries(Object.entries(parameters).map(([name, value]) => [name, String(value)]));
  }

  static fromParameters({ runs, run, class_id: classId, sample, step, metric, lines }) {
    const wanted = { run, classId, metric, lines, sample: sample && Number(sample), step: step && Number(step) };
    try {
      wanted.runs = runs && JSON.parse(runs);
    } catch {
      // a truncated link: the rest of it is still valid
    }
    return Object.fromEntries(Object.entries(wanted).filter(([, value]) => value !== undefined && value !== ""));
  }

  #resolve() {
    const wanted = this.#wanted;
    const known = new Map(this.catalog.map((entry) => [entry.id, entry]));
    this.runs = Array.isArray(wanted.runs) ? wanted.runs.filter((id) => known.has(id)) : [];
    if (!this.runs.length && this.catalog.length) this.runs = this.catalog.map(({ id }) => id).slice(0, 6);
    this.run = this.runs.includes(wanted.run) ? wanted.run : (this.runs[0] ?? null);
    this.entry = known.get(this.run) ?? null;
    this.entries = this.runs.map((id) => known.get(id));
    this.metric = this.metrics.find(({ name }) => name === wanted.metric) ?? this.metrics[0] ?? null;
    this.lines = wanted.lines;
    this.steps = this.entry?.steps ?? [];
    const ids = this.entry?.class_ids ?? [];
    this.classIndex = Math.max(0, ids.map(String).indexOf(String(wanted.classId))); // as a link or an option gives it
    this.classId = ids[this.classIndex] ?? null;
    this.sample = Math.min(Math.max(0, wanted.sample | 0), Math.max(0, (this.entry?.num_samples ?? 1) - 1));
    this.stepIndex = wanted.step === null ? this.steps.length - 1 : nearest(this.steps, wanted.step);
    this.step = this.steps[this.stepIndex] ?? null;
    this.atEnd = wanted.step === null;
  }

  // The step shown; the last one means: whichever is last, so that the page follows a run that goes on.
  setStepIndex(index) {
    this.set({ step: index >= this.steps.length - 1 ? null : this.steps[index] });
  }

  #notify() {
    this.#listeners.forEach((listener) => listener(this));
  }
}

// Which two input entries the pointer is at: `row` stays until another is pointed at, `pinned` until it is released.
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

  pin(row, column = null) {
    const same = this.pinned && row === this.row;
    this.#set(row, column, !same);
  }

  // As keys do: what is pinned moves, too.
  move(row, column = null) {
    this.#set(row, column, this.pinned);
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
  return joined([run === "." ? "this directory" : run, name, target], " · ");
}

// What an output is called: only those of a classification are classes.
export const outputWord = (entry) => (entry.has_classes === false ? "output" : "class");
export const plural = (word) => (word.endsWith("s") ? `${word}es` : `${word}s`);

// An output in words: "class 2", "class 2: frog", "label" or "predicted"; of a regression "output 2".
export function classTitle(entry, classId) {
  if (typeof classId !== "number") return classId;
  const known = entry.class_names?.[classId];
  const title = `${outputWord(entry)} ${classId}`;
  return known ? `${title}: ${known}` : title;
}

// The name of an output, or else its number.
export function outputName(entry, number) {
  return entry.class_names?.[number] ?? String(number);
}
