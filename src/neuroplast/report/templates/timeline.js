/* The timeline: one slider moves the logit difference, the heads and base's circuit together. */
(() => {
  const area = document.getElementById("timeline-area");
  if (!area) return;
  const data = page.read("timeline-data");
  const { svg, number, estimate } = page;
  const find = (name) => area.querySelector(`[data-part="${name}"]`);
  const way = find("way"), slider = find("slider"), play = find("play"), said = find("said");
  const graph = find("graph");
  const heat = page.heatMap(find("heat"), data.layers, data.heads, data.bound, "Effects of all heads at this moment");
  const chart = find("chart");
  let current, cursor, timer = 0;

  const acting = new Set(data.acting);
  const moments = () => current.moments;

  function drawChart() {
    chart.replaceChildren();
    const width = 560, height = 330, left = 46, right = 12, top = 24, gap = 34, low = 40;
    const upper = 150, lower = height - top - upper - gap - low;
    const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "lines", role: "img",
      "aria-label": "Logit difference, and likeness of the head effects to base, over the steps; the slider tells the numbers" }, chart);
    /* Steps are dense early and far apart later, so moments stand at even distances. */
    const x = (index) => left + (width - left - right) * (moments().length > 1 ? index / (moments().length - 1) : 0.5);
    const panels = [
      { field: "ld", y: top, height: upper, name: "logit difference" },
      { field: "similarity", y: top + upper + gap, height: lower, name: "likeness to base", range: [-1, 1] },
    ];
    for (const panel of panels) {
      const numbers = moments().flatMap((each) => each[panel.field] || []).concat(0);
      let [least, most] = panel.range || [Math.min(...numbers), Math.max(...numbers)];
      if (least === most) most = least + 1;
      const y = (value) => panel.y + panel.height * (most - value) / (most - least);
      svg("line", { x1: left, x2: width - right, y1: y(0), y2: y(0), class: "zero" }, drawing);
      for (const value of [least, 0, most].filter((v, i, all) => i === 1 || Math.abs(y(v) - y(0)) > 12 || all[1] === v)) {
        svg("text", { x: left - 6, y: y(value), class: "tick end" }, drawing, number(value, panel.range ? 0 : 1));
      }
      svg("text", { x: left, y: panel.y - 13, class: "tick name" }, drawing, panel.name);
      moments().forEach((each, index) => {
        const found = each[panel.field];
        if (!found) return;
        const before = index ? moments()[index - 1][panel.field] : null;
        if (before) svg("line", { x1: x(index - 1), y1: y(before[0]), x2: x(index), y2: y(found[0]), class: `line ${each.kind}` }, drawing);
        if (found.length > 1) svg("line", { x1: x(index), x2: x(index), y1: y(found[1]), y2: y(found[2]), class: `bar ${each.kind}` }, drawing);
        svg("circle", { cx: x(index), cy: y(found[0]), r: 3, class: `point ${each.kind}` }, drawing);
      });
    }
    svg("text", { x: left + (width - left - right) / 2, y: height - 6, class: "tick middle" }, drawing, "steps of each training, evenly spaced");
    const foot = height - low + 16;
    moments().forEach((each, index) => {
      const crowded = moments().length > 14 && index % 2 && index < moments().length - 1;
      if (!crowded) svg("text", { x: x(index), y: foot - 4, class: "tick middle" }, drawing, each.step);
    });
    cursor = svg("line", { y1: top, y2: height - low, class: "cursor" }, drawing);
    cursor.place = (index) => { cursor.setAttribute("x1", x(index)); cursor.setAttribute("x2", x(index)); };
    drawing.addEventListener("pointerdown", (event) => {
      const box = drawing.getBoundingClientRect();
      const at = ((event.clientX - box.left) / box.width * width - left) / (width - left - right);
      slider.value = Math.max(0, Math.min(moments().length - 1, Math.round(at * (moments().length - 1))));
      show();
    });
  }

  function paintGraph(index) {
    if (!graph) return;
    const strength = {};
    for (const [node, values] of Object.entries(current.strengths)) strength[node] = values[index];
    for (const box of graph.querySelectorAll("[data-node]")) {
      const value = strength[box.dataset.node];
      const known = value !== undefined && value !== null;
      const fill = known ? page.diverging(-value) : null;
      const shape = box.querySelector("rect");
      shape.style.fill = known ? page.rgb(fill) : "";
      shape.classList.toggle("untold", !known && box.dataset.part === "true");
      for (const text of box.querySelectorAll("text")) text.style.fill = known ? page.inkOn(fill) : "";
      const below = box.querySelector(".score");
      if (below) below.textContent = known ? `${number(100 * value, 0)} %` : "";
      if (box.dataset.part === "true") {
        const whose = acting.has(box.dataset.node) ? "its" : "its role’s";
        box.setAttribute("aria-label", `${box.dataset.node}: ${known ? `${number(100 * value, 0)} percent of ${whose} strength in base` : "no strength to compare"}`);
      }
    }
    for (const line of graph.querySelectorAll("[data-source]")) {
      const value = strength[line.dataset.source];
      const known = value !== undefined && value !== null;
      line.style.opacity = known ? 0.06 + 0.74 * Math.min(1, Math.abs(value)) : 0.25;
      line.classList.toggle("reversed", known && value < 0);
    }
  }

  function show() {
    const index = Number(slider.value), moment = moments()[index];
    const where = `${moment.stage}, step ${moment.step}`;
    const behaviour = `logit difference ${estimate(moment.ld)}`;
    const accuracy = moment.accuracy === null ? "" : `, ${number(100 * moment.accuracy, 0)} % right`;
    const likeness = moment.similarity ? `; likeness to base ${estimate(moment.similarity)}` : "";
    said.replaceChildren(
      page.html("b", { class: moment.kind }, null, where), document.createTextNode(` · ${behaviour}${accuracy}${likeness}`),
    );
    slider.setAttribute("aria-valuetext", `${where}: ${behaviour}`);
    cursor.place(index);
    const effects = moment.effects.map((value) => value / 1000 * data.bound);
    const first = moments()[0].effects;
    heat.paint(effects, (at) => [`base ${number(first[at] / 1000 * data.bound, 3)}`]);
    paintGraph(index);
  }

  function choose() {
    current = data.ways[Number(way.value)];
    slider.max = moments().length - 1;
    slider.value = 0;
    find("prompts").textContent = current.n_prompts ? `on ${current.n_prompts} of the study’s ${data.n_prompts || "?"} prompts` : "";
    drawChart();
    show();
  }

  function stop() {
    clearInterval(timer);
    timer = 0;
    play.textContent = "Play";
    said.setAttribute("aria-live", "polite");
  }
  play.addEventListener("click", () => {
    if (timer) return stop();
    if (Number(slider.value) === Number(slider.max)) slider.value = 0;
    play.textContent = "Pause";
    said.setAttribute("aria-live", "off");  // or a screen reader would have no time to say it
    show();
    timer = setInterval(() => {
      slider.value = Number(slider.value) + 1;
      show();
      if (Number(slider.value) === Number(slider.max)) stop();
    }, 700);
  });
  slider.addEventListener("input", () => { stop(); show(); });
  way.addEventListener("change", () => { stop(); choose(); });
  page.onTheme(show);
  choose();
})();
