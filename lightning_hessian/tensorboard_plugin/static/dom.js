// Elements of the page, and the frame that every view stands in.

// An element with properties (`data-…`, `aria-…` and `for` as attributes, `on…` as listeners) and children.
export function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name.includes("-") || name === "for") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

// Id and test id in one.
export const named = (id) => ({ id, "data-testid": id });

// A section with a title, one sentence on what it shows, a description of what is shown now, and a possible error.
export function panel(id, heading, hint) {
  const title = el("h2", {}, heading);
  const words = el("p", { className: "words", "data-testid": `${id}-words` });
  const message = el("p", { className: "message", hidden: true });
  const body = el("div", { className: "body", ...named(id) });
  const head = el("header", {}, title, el("p", { className: "hint" }, hint));
  const element = el("section", { className: `panel panel-${id}` }, head, message, words, body);

  function say(kind, sentence) {
    message.hidden = !sentence;
    message.className = `message ${kind}`;
    message.textContent = sentence;
    message.dataset.testid = kind;
    body.hidden = words.hidden = Boolean(sentence);
  }
  return {
    element,
    body,
    head,
    rename: (words) => (title.textContent = words),
    describe: (sentence) => (words.textContent = sentence),
    fail: (sentence) => say("error", sentence),
    empty: (sentence) => say("empty", sentence),
    clear: () => say("", ""),
  };
}

// A labeled choice; `options` are [value, text].
export function choice(id, label, onchange) {
  const select = el("select", { ...named(id), onchange: () => onchange(select.value) });
  const words = el("span", {}, label);
  const element = el("label", { className: "choice" }, words, select);
  function show(options, value, renamed = label) {
    words.textContent = renamed;
    const key = JSON.stringify(options);
    if (select.dataset.options !== key) {
      select.replaceChildren(...options.map(([each, text]) => el("option", { value: each }, text)));
      select.dataset.options = key;
    }
    select.value = value;
  }
  return { element, select, show };
}

const ARROWS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

// Makes a picture usable by keyboard: `move(down, right)` by one, or ten with Shift, and `keys` {key: action}.
export function usableByKeys(canvas, { move, ...keys }) {
  canvas.tabIndex = 0;
  canvas.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey) return; // the browser's own
    const arrow = ARROWS[event.key];
    if (arrow) move(...arrow.map((by) => by * (event.shiftKey ? 10 : 1)));
    else if (keys[event.key]) keys[event.key]();
    else return;
    event.preventDefault();
  });
}
