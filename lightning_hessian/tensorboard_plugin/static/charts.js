// Charts by Plotly, in the colors of the page.

const FONT = { family: "Roboto, system-ui, sans-serif", size: 12 };
const CONFIG = {
  responsive: true,
  displaylogo: false,
  modeBarButtonsToRemove: ["lasso2d", "select2d"],
  showSendToCloud: false, // nothing leaves this machine
  plotlyServerURL: "",
};

// Draws charts. `library` is a promise of Plotly, `root` the element whose style gives the colors.
export class Charts {
  before = async () => {}; // awaited before drawing

  constructor(library, root) {
    this.library = library;
    this.root = root;
  }

  color(name) {
    return getComputedStyle(this.root).getPropertyValue(`--${name}`).trim();
  }

  async draw(element, traces, { xaxis, yaxis, ...layout }) {
    const Plotly = await this.library;
    await this.before();
    const axis = {
      gridcolor: this.color("line"),
      zerolinecolor: this.color("zero"),
      linecolor: this.color("line"),
      automargin: true,
    };
    const axes = Object.entries({ xaxis, yaxis, ...layout }).filter(([name]) => /^[xy]axis\d*$/.test(name));
    await Plotly.react(
      element,
      traces,
      {
        font: { ...FONT, color: this.color("text") },
        paper_bgcolor: "rgba(0,0,0,0)",
        plot_bgcolor: "rgba(0,0,0,0)",
        margin: { l: 60, r: 20, t: 12, b: 44 },
        hoverlabel: { bgcolor: this.color("panel"), font: { color: this.color("text") } },
        ...layout,
        ...Object.fromEntries(axes.map(([name, options]) => [name, { ...axis, ...options }])),
      },
      CONFIG,
    );
  }

  // A chart over steps: a dotted line marks the step shown, and a click goes to another.
  async drawOverSteps(element, traces, state, layout) {
    const line = { color: this.color("accent"), width: 1.5, dash: "dot" };
    const marker = { type: "line", x0: state.step, x1: state.step, y0: 0, y1: 1, yref: "paper", line };
    await this.draw(element, traces, { xaxis: { title: { text: "step" } }, shapes: [marker], ...layout });
    element.removeAllListeners("plotly_click"); // those of earlier drawings
    element.on("plotly_click", ({ points }) => {
      const index = state.steps.indexOf(points[0].x);
      if (index >= 0) state.setStepIndex(index);
    });
  }
}

// Plotly, from a script of the same origin.
export function loadPlotly(url) {
  return new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = url;
    script.onload = () => resolve(window.Plotly);
    script.onerror = () =>
      reject(new Error("The chart library (plotly.min.js) did not load, so there are no charts."));
    document.head.append(script);
  });
}
