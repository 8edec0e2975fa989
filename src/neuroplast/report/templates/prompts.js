/* The prompts one by one: sorted by any column, the worst first; a row opens to its head effects. */
(() => {
  const area = document.getElementById("prompts-area");
  if (!area) return;
  const data = page.read("prompts-data");
  const { html, number } = page;
  const chosen = area.querySelector("select"), body = area.querySelector("tbody");
  const buttons = [...area.querySelectorAll("th button")];
  const base = data.stages.find((stage) => stage.kind === "base") || data.stages[0];
  const closers = new Map();
  let order = { key: "ld", up: true };

  function effectsOf(stage, row) {
    if (!stage.effects) return null;
    stage.decoded = stage.decoded || new Int16Array(page.bytes(stage.effects).buffer);
    const size = data.layers * data.heads;
    return Array.from(stage.decoded.subarray(row * size, (row + 1) * size), (value) => value / 32767 * data.bound);
  }

  const keys = {
    number: (row) => row,
    text: (row) => data.prompts[row][0],
    template: (row) => `${data.prompts[row][3]} ${data.prompts[row][4]}`,
    ld: (row, stage) => stage.ld[row],
    probability: (row, stage) => stage.probability[row],
    change: (row, stage) => stage.ld[row] - base.ld[row],
  };

  function open(row, stage, after) {
    const detail = html("tr", { class: "detail" }), drawn = [];
    const cell = html("td", { colspan: 6 }, detail);
    const maps = html("div", { class: "maps" }, cell);
    const pair = stage === base ? [base] : [base, stage];
    const known = pair.map((each) => effectsOf(each, row));
    if (known.some((each) => !each)) {
      html("p", { class: "note" }, cell, "The head effects of this stage on single prompts are in its effects.safetensors; the page has no room for them.");
    } else {
      const bound = Math.max(...known.flat().map(Math.abs)) || 1;
      pair.forEach((each, index) => {
        const box = html("div", {}, maps);
        html("p", { class: "note" }, box, `${each.id}: ${number(each.ld[row])}`);
        const map = page.heatMap(box, data.layers, data.heads, bound, `Head effects on this prompt, ${each.id}`);
        map.paint(known[index]);
        drawn.push(map);
      });
      const mine = known[known.length - 1];
      const strongest = mine.map((value, index) => [value, index]).sort((a, b) => Math.abs(b[0]) - Math.abs(a[0])).slice(0, 8);
      const list = html("ol", { class: "strongest", "aria-label": "The strongest heads on this prompt" }, maps);
      for (const [value, index] of strongest) {
        const item = html("li", {}, list);
        html("code", {}, item, `a${Math.floor(index / data.heads)}.h${index % data.heads}`);
        html("span", {}, item, ` ${number(value, 3)}`);
      }
    }
    after.after(detail);
    return () => {
      detail.remove();
      drawn.forEach((map) => map.forget());
    };
  }

  function draw() {
    const stage = data.stages[Number(chosen.value)], key = keys[order.key];
    const rows = data.prompts.map((_, row) => row).sort((a, b) => {
      const [one, other] = [key(a, stage), key(b, stage)];
      return (one < other ? -1 : one > other ? 1 : a - b) * (order.up ? 1 : -1);
    });
    closers.forEach((close) => close());
    closers.clear();
    body.replaceChildren();
    for (const row of rows) {
      const [text, answer, foil, template, group, answers, foils] = data.prompts[row];
      const oneOf = (count) => (count > 1 ? ` (1 of ${count})` : "");
      const line = html("tr", {}, body);
      const name = html("th", { scope: "row" }, line);
      const button = html("button", { type: "button", class: "plain", "aria-expanded": "false", "aria-label": `Prompt ${row + 1}: show head effects` }, name, row + 1);
      const said = html("td", { class: "said" }, line);
      html("bdi", {}, said, text);
      html("b", { class: "right", title: "right" }, said, answer + oneOf(answers));
      html("span", { class: "wrong", title: "wrong" }, said, ` / ${foil.trim()}${oneOf(foils)}`);
      html("td", { class: "quiet" }, line, [template, group].filter(Boolean).join(" · ") || "–");
      html("td", { class: "n lead" }, line, number(stage.ld[row]));
      html("td", { class: "n" }, line, number(stage.probability[row], 3));
      html("td", { class: "n" }, line, stage === base ? "–" : number(stage.ld[row] - base.ld[row]));
      button.addEventListener("click", () => {
        if (closers.has(row)) {
          closers.get(row)();
          closers.delete(row);
        } else {
          closers.set(row, open(row, stage, line));
        }
        button.setAttribute("aria-expanded", String(closers.has(row)));
      });
    }
    for (const button of buttons) {
      const mine = button.dataset.key === order.key;
      button.closest("th").setAttribute("aria-sort", mine ? (order.up ? "ascending" : "descending") : "none");
    }
  }

  for (const button of buttons) {
    button.addEventListener("click", () => {
      order = { key: button.dataset.key, up: order.key === button.dataset.key ? !order.up : true };
      draw();
    });
  }
  chosen.addEventListener("change", draw);
  draw();
})();
