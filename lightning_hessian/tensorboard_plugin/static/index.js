// The "Input Hessian" tab. TensorBoard calls `render`; the report calls `start` with a source of its own.

import { cached, httpSource } from "./api.js";
import { Charts, loadPlotly } from "./charts.js";
import { el, named } from "./dom.js";
import { standalone, tensorBoard, watchTheme } from "./host.js";
import { State } from "./state.js";
import { controls } from "./views/controls.js";
import { cost } from "./views/cost.js";
import { curves } from "./views/curves.js";
import { distribution } from "./views/distribution.js";
import { evolution } from "./views/evolution.js";
import { hessian } from "./views/hessian.js";
import { maps } from "./views/maps.js";
import { spectrum } from "./views/spectrum.js";
import { table } from "./views/table.js";

const VIEWS = [curves, distribution, spectrum, evolution, hessian, maps, table, cost];
const NOTHING =
  "There are no measurements in this log directory yet. Attach InputHessianMonitor(...) from lightning_hessian to your " +
  "Trainer's callbacks, and use a TensorBoardLogger. The first measurement is made before training and appears here as " +
  "soon as TensorBoard has loaded it.";

// What TensorBoard calls inside the plugin's frame.
export async function render() {
  document.title = "Input Hessian";
  await addStyle(new URL("./style.css", import.meta.url).href); // charts read their colors from it
  const root = el("main");
  document.body.append(root);
  await start(root, httpSource(document.baseURI), {
    plotly: loadPlotly(new URL("plotly.min.js", document.baseURI).href),
    host: tensorBoard("input_hessian"),
  });
}

const painted = () => new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve)));

function addStyle(href) {
  return new Promise((settle) => {
    document.head.append(el("link", { rel: "stylesheet", href, onload: settle, onerror: settle }));
  });
}

// Shows `source` in `root`; `options.plotly` is Plotly or a promise of it, `options.host` one of host.js.
export async function start(root, source, { plotly, host = standalone() }) {
  root.classList.add("input-hessian");
  const answers = cached(source);
  const state = new State(State.fromParameters(host.parameters()));
  const charts = new Charts(plotly, root);
  const error = el("p", { className: "message error", hidden: true, ...named("error") });
  const empty = el("p", { className: "message empty", hidden: true, ...named("empty") }, NOTHING);
  const views = VIEWS.map((make) => new Shown(make({ state, source: answers, charts })));
  const matrix = views[VIEWS.indexOf(hessian)];
  charts.before = () => matrix.done.then(painted); // charts block the page for about 0.2 s: the matrix comes first
  const grid = el("div", { className: "panels" }, ...views.map(({ view }) => view.element));
  const bar = controls(state, {
    drawn: () => Promise.all(views.map(({ done }) => done)),
    reload,
    link: host.link,
  });
  root.append(el("h1", {}, "Input Hessian"), bar.element, error, empty, grid);
  let last = ""; // the catalog, as text

  function refresh() {
    bar.update();
    grid.hidden = !state.entry;
    if (state.entry) views.forEach((view) => view.refresh());
  }

  async function reload() {
    try {
      const catalog = await answers.runs();
      const text = JSON.stringify(catalog);
      if (text !== last) {
        last = text;
        answers.renew(catalog);
        views.forEach((view) => view.forget());
        state.setCatalog(catalog);
      }
      showErrors();
    } catch (failure) {
      showErrors(failure.message);
    }
  }

  function showErrors(...sentences) {
    const all = [...sentences, ...state.unreadable];
    error.hidden = !all.length;
    error.textContent = all.join(" ");
    empty.hidden = Boolean(state.entry || all.length);
  }

  state.listen(refresh);
  watchTheme((theme) => {
    root.dataset.theme = theme;
    views.forEach((view) => view.forget());
    refresh();
  });
  await reload();
  await host.onReload(reload);
  await Promise.all(views.map(({ done }) => done));
}

// A view that is drawn again when its key changes; an answer that comes too late is dropped, an error shown in its stead.
class Shown {
  #key = null;
  #turn = 0;
  done = Promise.resolve();

  constructor(view) {
    this.view = view;
  }

  forget() {
    this.#key = null;
  }

  refresh() {
    const key = this.view.key();
    if (key === this.#key) return;
    this.#key = key;
    const turn = ++this.#turn;
    const isStale = () => turn !== this.#turn;
    this.view.element.setAttribute("aria-busy", "true");
    this.done = this.view
      .update(isStale)
      .catch((error) => isStale() || this.#fail(error))
      .finally(() => {
        if (!isStale()) this.view.element.setAttribute("aria-busy", "false");
      });
  }

  #fail(error) {
    if (error.isExpected) this.view.empty(error.message);
    else this.view.fail(error.message);
    this.forget(); // tried again at the next change or reload
  }
}
