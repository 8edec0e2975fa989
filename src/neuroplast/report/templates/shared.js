"use strict";
/* What the scripts of the page share: colours, small SVG, numbers, the hint beside the pointer, heat maps. */
const page = (() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const scales = read("scales");
  const listeners = [];
  const isDark = () => dark.matches && root.dataset.theme !== "light";
  const colour = (name) => getComputedStyle(root).getPropertyValue("--" + name).trim();
  const retheme = () => listeners.forEach((listener) => listener());
  dark.addEventListener("change", retheme);
  addEventListener("beforeprint", () => { root.dataset.theme = "light"; retheme(); });
  addEventListener("afterprint", () => { delete root.dataset.theme; retheme(); });

  const channels = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));

  /* The colour of a share of the scale's bound: -1 helps most, 1 hinders most. */
  function diverging(share) {
    const scale = scales[isDark() ? "dark" : "light"];
    const at = (Math.min(1, Math.max(-1, share)) + 1) / 2 * (scale.length - 1);
    const low = Math.min(Math.floor(at), scale.length - 2), rest = at - low;
    const [a, b] = [channels(scale[low]), channels(scale[low + 1])];
    return a.map((value, index) => Math.round(value + rest * (b[index] - value)));
  }
  const rgb = (parts) => `rgb(${parts.join(",")})`;
  /* The ink of higher contrast, by the relative luminance of WCAG 2. */
  function inkOn(parts) {
    const [r, g, b] = parts.map((part) => part / 255).map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    const light = 0.2126 * r + 0.7152 * g + 0.0722 * b;
    return 1.05 / (light + 0.05) > (light + 0.05) / 0.0582 ? "#ffffff" : "#14181f";
  }

  function element(namespace, tag, attributes, parent, text) {
    const made = namespace ? document.createElementNS(namespace, tag) : document.createElement(tag);
    for (const [key, value] of Object.entries(attributes || {})) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    if (parent) parent.append(made);
    return made;
  }
  const svg = (...rest) => element("http://www.w3.org/2000/svg", ...rest);
  const html = (...rest) => element(null, ...rest);

  function number(value, digits = 2) {
    if (value === null || value === undefined) return "–";
    const text = value.toFixed(digits);
    return Number(text) === 0 ? text.replace("-", "") : text.replace("-", "−");
  }
  /* A value with its interval, from [value, low, high]. */
  function estimate(found, digits = 2) {
    if (!found) return "–";
    const [value, low, high] = found;
    return number(value, digits) + (high === undefined ? "" : ` [${number(low, digits)}, ${number(high, digits)}]`);
  }
  /* A name that may be broken where its parts meet. */
  const breakable = (name) => name.replace(/[/_]/g, "$&\u200b");
  const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));

  const hint = html("div", { class: "hint", role: "tooltip", hidden: "" }, document.body);
  function showHint(event, lines) {
    hint.replaceChildren(...lines.filter(Boolean).map((line, index) => html(index ? "span" : "b", {}, null, line)));
    hint.hidden = false;
    const box = hint.getBoundingClientRect(), margin = 12;
    const at = event.clientX === undefined || event.type === "focus" ? event.target.getBoundingClientRect() : null;
    const x = at ? at.right : event.clientX, y = at ? at.top : event.clientY;
    hint.style.left = Math.max(4, Math.min(x + margin, innerWidth - box.width - 4)) + "px";
    hint.style.top = Math.max(4, y + margin + box.height > innerHeight ? y - box.height - margin : y + margin) + "px";
  }
  const hideHint = () => { hint.hidden = true; };
  addEventListener("scroll", hideHint, { passive: true, capture: true });
  addEventListener("keydown", (event) => event.key === "Escape" && hideHint());

  /* Effects of all heads, layer 0 below; `paint(values)` shows others. The arrow keys walk from head to head. */
  function heatMap(parent, layers, heads, bound, label, what = "effect") {
    const wide = Math.max(9, Math.min(36, Math.floor(320 / heads))), high = Math.max(7, Math.min(28, Math.floor(360 / layers)));
    const left = 40, low = 36, width = left + heads * wide, height = layers * high + low;
    const drawing = svg("svg", {
      viewBox: `0 0 ${width} ${height}`, width, height, class: "heat", tabindex: 0, role: "img", "aria-label": label,
    }, parent);
    const cells = [], values = [];
    for (let index = 0; index < layers * heads; index += 1) {
      const layer = Math.floor(index / heads), head = index % heads;
      cells.push(svg("rect", {
        x: left + head * wide, y: (layers - 1 - layer) * high, width: wide - 1, height: high - 1, "data-index": index,
      }, drawing));
    }
    const every = (count) => [1, 2, 5, 10, 20, 50].find((step) => count <= 7 * step) || 100;
    for (let layer = 0; layer < layers; layer += every(layers)) {
      svg("text", { x: left - 6, y: (layers - 0.5 - layer) * high, class: "tick end" }, drawing, layer);
    }
    for (let head = 0; head < heads; head += every(heads)) {
      svg("text", { x: left + (head + 0.5) * wide, y: layers * high + 12, class: "tick middle" }, drawing, head);
    }
    svg("text", { x: left + heads * wide / 2, y: height - 7, class: "tick middle" }, drawing, "head");
    svg("text", { x: 8, y: layers * high / 2, class: "tick middle", transform: `rotate(-90 8 ${layers * high / 2})` }, drawing, "layer");
    const ring = svg("rect", { width: wide - 1, height: high - 1, class: "ring", visibility: "hidden" }, drawing);
    let at = 0, shown = [], extra = () => [];
    const name = (index) => `a${Math.floor(index / heads)}.h${index % heads}`;
    const lines = (index) => [name(index), `${what} ${number(shown[index], 3)}`, ...extra(index)];
    drawing.addEventListener("pointermove", (event) => {
      const index = event.target.dataset.index;
      if (index === undefined) return hideHint();
      showHint(event, lines(Number(index)));
    });
    drawing.addEventListener("pointerleave", hideHint);
    drawing.addEventListener("blur", () => { hideHint(); ring.setAttribute("visibility", "hidden"); });
    drawing.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: heads, ArrowDown: -heads }[event.key];
      if (!move) return;
      event.preventDefault();
      if (at + move >= 0 && at + move < cells.length) at += move;
      for (const side of ["x", "y"]) ring.setAttribute(side, cells[at].getAttribute(side));
      ring.setAttribute("visibility", "visible");
      drawing.setAttribute("aria-label", `${label}. ${lines(at).join(", ")}`);
      showHint({ target: cells[at] }, lines(at));
    });
    function paint(values, more) {
      shown = values;
      extra = more || (() => []);
      cells.forEach((cell, index) => cell.setAttribute("fill", rgb(diverging(values[index] / bound))));
    }
    const repaint = () => paint(shown, extra);
    listeners.push(repaint);
    const forget = () => listeners.splice(listeners.indexOf(repaint), 1);
    return { paint, forget };
  }

  return {
    read, colour, isDark, diverging, rgb, inkOn, svg, html, number, estimate, breakable, bytes, showHint, hideHint, heatMap,
    onTheme: (listener) => listeners.push(listener), scales,
  };
})();
