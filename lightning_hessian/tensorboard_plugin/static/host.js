// The page around the tab: what a link selects, when TensorBoard has reloaded, and whether it is dark.

const REPLY_MS = 2000;
const POLL_MS = 30000;

// TensorBoard's experimental messages to plugins.
export function tensorBoard(name) {
  const waiting = new Map();
  const listeners = new Map();
  const { port1: port, port2 } = new MessageChannel();
  let next = 0;

  port.onmessage = ({ data }) => {
    const { type, id, payload, isReply } = JSON.parse(data);
    if (isReply) {
      waiting.get(id)?.(payload);
      waiting.delete(id);
      return;
    }
    listeners.get(type)?.(payload);
    port.postMessage(JSON.stringify({ type, id, payload: null, error: null, isReply: true }));
  };
  if (window.parent !== window) window.parent.postMessage("experimental.bootstrap", "*", [port2]);

  const ask = (type) =>
    new Promise((resolve, reject) => {
      const id = next++;
      waiting.set(id, resolve);
      setTimeout(() => reject(new Error(`No answer to ${type}.`)), REPLY_MS);
      port.postMessage(JSON.stringify({ type, id, payload: null, error: null, isReply: false }));
    });

  return {
    // What a shared link selects: `p.<plugin>.…` after the tab's name in the address. TensorBoard's own message for it
    // (GetURLPluginData) answers with nothing until the address changes, so it is read from the page around.
    parameters() {
      const prefix = `p.${name}.`;
      const all = [...new URLSearchParams(outerWindow().location.hash.slice(1))];
      return Object.fromEntries(
        all.filter(([key]) => key.startsWith(prefix)).map(([key, value]) => [key.slice(prefix.length), value]),
      );
    },
    // Calls `reload` when TensorBoard has reloaded; if it does not report that, every half minute.
    async onReload(reload) {
      listeners.set("experimental.DataReloaded", reload);
      try {
        await ask("experimental.GetRuns");
      } catch {
        setInterval(reload, POLL_MS);
      }
    },
    // A link to this selection: of what follows the tab's name, TensorBoard passes `p.<plugin>.…` on to the plugin.
    link(parameters) {
      const url = new URL(outerWindow().location.href);
      const all = Object.entries(parameters).map(([key, value]) => `&p.${name}.${key}=${encodeURIComponent(value)}`);
      url.hash = name + all.join("");
      return url.href;
    },
  };
}

// The host of a standalone page: the selection is in the address, and nothing reloads.
export function standalone() {
  return {
    parameters: () => Object.fromEntries(new URLSearchParams(location.hash.slice(1))),
    onReload: async () => {},
    link: (parameters) => {
      const url = new URL(location.href);
      url.hash = new URLSearchParams(parameters).toString();
      return url.href;
    },
  };
}

// The window around the frame if it may be read, else this one.
function outerWindow() {
  try {
    return window.parent.document ? window.parent : window;
  } catch {
    return window; // of another origin
  }
}

// Calls `apply("dark" | "light")` now and whenever it changes: TensorBoard marks its body, else the system decides.
export function watchTheme(apply) {
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const outer = outerWindow();
  const framed = outer !== window;
  const dark = () => (framed ? outer.document.body.classList.contains("dark-mode") : system.matches);
  const update = () => apply(dark() ? "dark" : "light");
  if (framed) new MutationObserver(update).observe(outer.document.body, { attributeFilter: ["class"] });
  else system.addEventListener("change", update);
  update();
}
