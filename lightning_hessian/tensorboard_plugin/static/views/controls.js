// The selection: runs, class, sample and step.

import { lineColor } from "../colors.js";
import { choice, el, named } from "../dom.js";
import { classTitle, outputWord } from "../state.js";

const PLAY_MS = 450;
const MOST_LISTED = 50; // samples; of more, one is chosen by its number

// `drawn` returns a promise that every view has drawn the selection.
export function controls(state, { drawn, reload, link }) {
  const runs = el("fieldset", { className: "runs", ...named("run-select") });
  const focus = choice("focus-select", "details of", (run) => state.set({ run }));
  const classId = choice("class-select", "class", (value) => state.set({ classId: value }));
  const sample = choice("sample-select", "sample", (number) => state.set({ sample: Number(number) }));
  const number = el("input", {
    type: "number",
    min: 0,
    ...named("sample-number"),
    onchange: () => state.set({ sample: Number(number.value) }),
  });
  const last = el("span", { className: "hint" });
  const numbered = el("label", { className: "choice" }, el("span", {}, "sample"), number, last);
  const slider = el("input", {
    type: "range",
    min: 0,
    "aria-label": "step",
    ...named("step-slider"),
    oninput: () => state.setStepIndex(Number(slider.value)),
  });
  const when = el("output", { ...named("step-text") });
  const play = el("button", { type: "button", title: "play all steps", ...named("play"), onclick: toggle }, "▶");
  const copied = el("span", { className: "hint" });
  const buttons = el(
    "span",
    { className: "buttons" },
    el("button", { type: "button", ...named("reload"), onclick: reload }, "Reload"),
    el("button", { type: "button", ...named("copy-link"), onclick: copy }, "Copy link"),
    copied,
  );
  const element = el(
    "div",
    { className: "controls" },
    runs,
    el(
      "div",
      { className: "row" },
      focus.element,
      classId.element,
      sample.element,
      numbered,
      el("label", { className: "choice step" }, el("span", {}, "step"), play, slider, when),
      buttons,
    ),
  );
  let playing = null;

  async function toggle() {
    const mine = playing ? null : {};
    playing = mine;
    play.textContent = mine ? "⏸" : "▶";
    if (mine && state.stepIndex >= state.steps.length - 1) state.setStepIndex(0);
    while (mine && playing === mine) {
      await Promise.all([drawn(), new Promise((resolve) => setTimeout(resolve, PLAY_MS))]);
      if (playing !== mine) return;
      if (state.stepIndex >= state.steps.length - 1) return toggle();
      state.setStepIndex(state.stepIndex + 1);
    }
  }

  async function copy() {
    const address = link(state.toParameters());
    try {
      await navigator.clipboard.writeText(address);
      copied.textContent = "copied";
    } catch {
      copied.textContent = address; // the browser does not allow it: the user copies it
    }
    setTimeout(() => (copied.textContent = ""), 8000);
  }

  function choose() {
    const chosen = [...runs.querySelectorAll("input:checked")].map(({ value }) => value);
    state.set({ runs: chosen.length ? chosen : state.runs }); // at least one
  }

  function update() {
    const { entry } = state;
    element.hidden = !entry;
    if (!entry) return;
    runs.replaceChildren(
      el("legend", {}, "runs"),
      ...state.catalog.map(({ id, run, label, index }) => {
        const box = el("input", {
          type: "checkbox",
          value: id,
          checked: state.runs.includes(id),
          onchange: choose,
          "data-run": run,
        });
        box.style.accentColor = lineColor(index);
        const swatch = el("span", { className: "swatch" });
        swatch.style.background = lineColor(index);
        return el("label", {}, box, swatch, label);
      }),
    );
    focus.show(
      state.entries.map(({ id, label }) => [id, label]),
      state.run,
    );
    classId.show(
      entry.class_ids.map((each) => [String(each), classTitle(entry, each)]),
      String(state.classId),
      outputWord(entry),
    );
    const isLong = entry.num_samples > MOST_LISTED;
    sample.element.hidden = isLong;
    numbered.hidden = !isLong;
    const samples = Array.from({ length: isLong ? 0 : entry.num_samples }, (_, n) => [String(n), String(n)]);
    sample.show(samples, String(state.sample));
    number.max = entry.num_samples - 1;
    number.value = state.sample;
    last.textContent = `of 0 to ${entry.num_samples - 1}`;
    slider.max = Math.max(0, state.steps.length - 1);
    slider.value = state.stepIndex;
    const epoch = entry.epochs?.[state.stepIndex];
    when.textContent = `step ${state.step}, epoch ${epoch} (${state.stepIndex + 1} of ${state.steps.length})`;
  }

  return { element, update };
}
