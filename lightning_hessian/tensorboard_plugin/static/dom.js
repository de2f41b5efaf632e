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
export function panel(id, title, hint) {
  const words = el("p", { className: "words", "data-testid": `${id}-words` });
  const message = el("p", { className: "message", hidden: true });
  const body = el("div", { className: "body", ...named(id) });
  const head = el("header", {}, el("h2", {}, title), el("p", { className: "hint" }, hint));
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
    describe: (sentence) => (words.textContent = sentence),
    fail: (sentence) => say("error", sentence),
    empty: (sentence) => say("empty", sentence),
    clear: () => say("", ""),
  };
}

// A labeled choice; `options` are [value, text].
export function choice(id, label, onchange) {
  const select = el("select", { ...named(id), onchange: () => onchange(select.value) });
  const element = el("label", { className: "choice" }, el("span", {}, label), select);
  function show(options, value) {
    const key = JSON.stringify(options);
    if (select.dataset.options !== key) {
      select.replaceChildren(...options.map(([each, text]) => el("option", { value: each }, text)));
      select.dataset.options = key;
    }
    select.value = value;
  }
  return { element, select, show };
}
