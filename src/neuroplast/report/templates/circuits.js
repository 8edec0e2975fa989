/* The circuits: point at a node to see what it does, choose it to see it on real prompts and over the stages. */
(() => {
  const store = document.getElementById("looks-data");
  if (!store) return;
  const data = page.read("looks-data");
  const { html, number, estimate } = page;
  const triangle = (row) => row * (row + 1) / 2;

  const partOf = (node) => node.split("@")[0];
  /* Effects on the logits are measured at END, wherever else a head stands. */
  const atEnd = (node) => (placeOf(node) === "end" ? "" : " at END");
  const placeOf = (node) => node.split("@")[1] || "end";

  function hintOf(box, stage) {
    const node = box.dataset.node, effect = data.effects[partOf(node)], look = (data.looks[node] || [])[stage];
    const seen = look ? Object.entries(look.attention).filter(([name, found]) => found && name !== "own token") : [];
    seen.sort((a, b) => b[1][0] - a[1][0]);
    return [
      node, box.dataset.role, box.dataset.score && `score in the circuit ${box.dataset.score}`,
      effect && `direct effect${atEnd(node)} ${estimate(effect[stage])}`,
      ...seen.slice(0, 2).map(([name, found]) => `attention to ${name} ${number(found[0])}`),
      look && look.copy && `copies ${number(100 * look.copy[0], 0)} % of the names`,
    ];
  }

  function highlight(drawing, node) {
    drawing.classList.toggle("focused", Boolean(node));
    for (const line of drawing.querySelectorAll("[data-source]")) {
      line.classList.toggle("lit", line.dataset.source === node || line.dataset.destination === node);
    }
  }

  /* A head's attention from one token, a line a stage; a token that is chosen becomes the one that attends. */
  function strips(parent, node) {
    const part = partOf(node);
    const kept = data.patterns.map((each, index) => [index, each && each[part]]).filter(([, each]) => each);
    if (!kept.length) {
      html("p", { class: "note" }, parent, "The page has no attention of it: the study keeps that of the circuits’ and of the strongest heads (patterns.safetensors), and shows what there is room for.");
      return;
    }
    const bar = html("div", { class: "controls" }, parent);
    const label = html("label", {}, bar, "Prompt ");
    const chosen = html("select", {}, label);
    data.tokens.forEach((tokens, index) => html("option", { value: index }, chosen, `${index + 1}: ${tokens.join("").slice(0, 70)}`));
    const grid = html("div", { class: "strips scroll" }, parent);
    let from = null;
    function draw() {
      const prompt = Number(chosen.value), tokens = data.tokens[prompt];
      const named = data.positions[placeOf(node)];
      const query = from === null ? (named ? named[prompt] : tokens.length - 1) : Math.min(from, tokens.length - 1);
      grid.replaceChildren();
      for (const [stage, pattern] of kept) {
        const row = html("div", { class: "strip" }, grid);
        html("span", { class: `stage-id ${data.stages[stage].kind}` }, row, page.breakable(data.stages[stage].id));
        const words = html("span", { class: "tokens", dir: "ltr" }, row);
        const weights = page.bytes(pattern[prompt]);
        tokens.forEach((token, key) => {
          const weight = key <= query ? weights[triangle(query) + key] / 255 : 0;
          const button = html("button", {
            type: "button", class: "token" + (key === query ? " query" : ""), style: `--weight: ${weight.toFixed(3)}`,
            "aria-label": `${token}: ${number(100 * weight, 0)} percent${key === query ? ", attends from here" : ""}`,
          }, words);
          html("bdi", {}, button, token.trim() || "␣");
          button.addEventListener("pointerenter", (event) => page.showHint(event, [token, key <= query ? `${number(100 * weight, 0)} % of its attention` : "comes later"]));
          button.addEventListener("pointerleave", page.hideHint);
          button.addEventListener("click", () => {
            const row = [...grid.children].indexOf(button.closest(".strip"));
            from = key;
            draw();
            grid.children[row].querySelectorAll(".token")[key].focus();
          });
        });
      }
    }
    chosen.addEventListener("change", () => { from = null; draw(); });
    draw();
    html("p", { class: "note" }, parent, "The framed token attends; the darker another, the more it gets. Choose a token to let that one attend.");
  }

  function history(parent, node) {
    const effects = data.effects[partOf(node)], looks = data.looks[node] || [];
    if (!effects) return;
    const names = [...new Set(looks.flatMap((look) => (look ? Object.keys(look.attention) : [])))];
    const scroll = html("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": `${node} over the stages` }, parent);
    const table = html("table", { class: "dense" }, scroll);
    const head = html("tr", {}, html("thead", {}, table));
    ["Stage", `Direct effect${atEnd(node)}`, ...names.map((name) => `Attention to ${name}`), "Copies", "Copies negatively"].forEach(
      (name, index) => html("th", index ? { class: "n", scope: "col" } : { scope: "col" }, head, name),
    );
    const body = html("tbody", {}, table);
    data.stages.forEach((stage, index) => {
      const row = html("tr", {}, body), look = looks[index];
      html("th", { scope: "row", class: "stage-id" }, row, page.breakable(stage.id));
      const cell = (found, digits) => {
        const box = html("td", { class: "n" }, row);
        if (!found) return void (box.textContent = "–");
        html("span", { class: "value" }, box, number(found[0], digits));
        if (found.length > 1) html("span", { class: "ci" }, box, `[${number(found[1], digits)}, ${number(found[2], digits)}]`);
      };
      cell(effects[index], 2);
      for (const name of names) cell(look && look.attention[name], 2);
      cell(look && look.copy, 2);
      cell(look && look.negative, 2);
    });
  }

  for (const figure of document.querySelectorAll(".graph-figure[data-stage]")) {
    const drawing = figure.querySelector("svg"), panel = figure.querySelector(".inspector");
    const stage = data.stages.findIndex((each) => each.id === figure.dataset.stage);
    let chosen = null;
    function choose(box) {
      if (chosen) chosen.classList.remove("chosen");
      chosen = box === chosen ? null : box;
      panel.replaceChildren();
      panel.hidden = !chosen;
      for (const each of figure.querySelectorAll('[data-part="true"]')) each.setAttribute("aria-expanded", String(each === chosen));
      if (!chosen) return highlight(drawing, null);
      chosen.classList.add("chosen");
      const node = chosen.dataset.node;
      const title = html("h4", {}, panel);
      html("code", {}, title, node);
      if (chosen.dataset.role) html("span", {}, title, ` · ${chosen.dataset.role}`);
      if (chosen.dataset.why) html("p", { class: "note" }, panel, chosen.dataset.why);
      history(panel, node);
      if (data.effects[partOf(node)]) strips(panel, node);
    }
    for (const box of figure.querySelectorAll('[data-part="true"]')) {
      const node = box.dataset.node;
      box.addEventListener("pointermove", (event) => { page.showHint(event, hintOf(box, stage)); highlight(drawing, node); });
      box.addEventListener("pointerleave", () => { page.hideHint(); highlight(drawing, chosen && chosen.dataset.node); });
      box.addEventListener("focus", (event) => { page.showHint(event, hintOf(box, stage)); highlight(drawing, node); });
      box.addEventListener("blur", () => { page.hideHint(); highlight(drawing, chosen && chosen.dataset.node); });
      box.addEventListener("click", () => choose(box));
      box.addEventListener("keydown", (event) => {
        if (event.key === "Enter" || event.key === " ") { event.preventDefault(); choose(box); }
      });
    }
    for (const line of figure.querySelectorAll("[data-source]")) {
      line.addEventListener("pointermove", (event) => page.showHint(event, line.dataset.edge.split("  ")));
      line.addEventListener("pointerleave", page.hideHint);
    }
  }
})();
