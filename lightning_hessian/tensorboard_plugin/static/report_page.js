// The entry of a page of its own, as `lightning-hessian report` writes it: nothing is fetched.

import { el } from "./dom.js";
import { start } from "./index.js";
import { pageSource } from "./report_source.js";

const catalog = JSON.parse(document.getElementById("catalog").textContent);
const root = document.getElementById("root");
await start(root, pageSource(document, catalog), { plotly: window.Plotly });
const partial = catalog.runs.runs.flatMap(({ run, tags }) =>
  tags
    .filter(({ left_out: told }) => told)
    .map(({ name, target, left_out: told }) => el("li", {}, `${[run, name, target].filter(Boolean).join(" · ")}: ${told}`)),
);
if (partial.length) {
  const advice = "To keep this page small it does not hold everything; the runs' own directories do.";
  const words = el("section", { className: "panel", "data-testid": "left-out" }, el("p", {}, advice), el("ul", {}, ...partial));
  root.querySelector("h1").after(words);
}
root.append(el("footer", { className: "hint" }, `Written by lightning-hessian ${catalog.version}. All data are in this page.`));
