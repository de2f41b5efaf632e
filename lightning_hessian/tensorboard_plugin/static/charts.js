// Charts by Plotly, in the colours of the page.

const FONT = { family: "Roboto, system-ui, sans-serif", size: 12 };
const CONFIG = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d"] };

// Draws charts. `library` is a promise of Plotly, `root` the element whose style gives the colours.
export class Charts {
  before = async () => {}; // awaited before drawing

  constructor(library, root) {
    this.library = library;
    this.root = root;
  }

  colour(name) {
    return getComputedStyle(this.root).getPropertyValue(`--${name}`).trim();
  }

  async draw(element, traces, { xaxis, yaxis, ...layout }) {
    const Plotly = await this.library;
    await this.before();
    const axis = {
      gridcolor: this.colour("line"),
      zerolinecolor: this.colour("zero"),
      linecolor: this.colour("line"),
      automargin: true,
    };
    const axes = Object.entries({ xaxis, yaxis, ...layout }).filter(([name]) => /^[xy]axis\d*$/.test(name));
    await Plotly.react(
      element,
      traces,
      {
        font: { ...FONT, color: this.colour("text") },
        paper_bgcolor: "rgba(0,0,0,0)",
        plot_bgcolor: "rgba(0,0,0,0)",
        margin: { l: 60, r: 20, t: 12, b: 44 },
        hoverlabel: { bgcolor: this.colour("panel"), font: { color: this.colour("text") } },
        ...layout,
        ...Object.fromEntries(axes.map(([name, options]) => [name, { ...axis, ...options }])),
      },
      CONFIG,
    );
  }

  // Calls `listener` with Plotly's click, once however often the chart is drawn.
  onClick(element, listener) {
    element.removeAllListeners("plotly_click");
    element.on("plotly_click", listener);
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
