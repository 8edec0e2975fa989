/* Several runs: the logit difference and the likeness to base over steps, a colour a run. */
(() => {
  const runs = page.read("runs-data");
  const { svg, html, number } = page;
  const chosen = document.getElementById("runs-way"), area = document.getElementById("runs-chart");
  const names = [...new Set(runs.flatMap((run) => run.ways.map((way) => way.name)))];
  names.forEach((name) => html("option", {}, chosen, name));

  function draw() {
    area.replaceChildren();
    const width = 860, height = 400, left = 48, right = 14;
    const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "lines", role: "img", style: "cursor: default",
      "aria-label": "Line chart by run; the numbers are in the table beside this page" }, area);
    const shown = runs.flatMap((run) => run.ways.filter((way) => way.name === chosen.value).map((way) => [run, way]));
    const most = Math.max(1, ...shown.flatMap(([, way]) => way.moments.map((each) => each.at)));
    const x = (at) => left + (width - left - right) * at / most;
    for (const panel of [
      { field: "ld", y: 22, height: 190, name: "logit difference" },
      { field: "similarity", y: 248, height: 104, name: "likeness to base", range: [-1, 1] },
    ]) {
      const values = shown.flatMap(([, way]) => way.moments.map((each) => each[panel.field])).filter((each) => each !== null).concat(0);
      let [low, high] = panel.range || [Math.min(...values), Math.max(...values)];
      if (low === high) high = low + 1;
      const y = (value) => panel.y + panel.height * (high - value) / (high - low);
      svg("text", { x: left, y: panel.y - 12, class: "tick name" }, drawing, panel.name);
      for (const value of new Set([low, 0, high])) {
        svg("line", { x1: left, x2: width - right, y1: y(value), y2: y(value), class: "zero", style: value ? "opacity: .25" : "" }, drawing);
        svg("text", { x: left - 6, y: y(value), class: "tick end" }, drawing, number(value, panel.range ? 0 : 1));
      }
      for (const [run, way] of shown) {
        const points = way.moments.filter((each) => each[panel.field] !== null);
        svg("polyline", { points: points.map((each) => `${x(each.at)},${y(each[panel.field])}`).join(" "), fill: "none", stroke: run.colour, "stroke-width": 2 }, drawing);
        for (const each of points) {
          const dot = svg("circle", { cx: x(each.at), cy: y(each[panel.field]), r: 4, fill: run.colour }, drawing);
          dot.addEventListener("pointermove", (event) => page.showHint(event, [run.name, `${each.stage}, step ${each.step}`, `${panel.name} ${number(each[panel.field])}`]));
          dot.addEventListener("pointerleave", page.hideHint);
        }
      }
    }
    for (let tick = 0; tick <= 4; tick += 1) {
      svg("text", { x: x(most * tick / 4), y: height - 30, class: "tick middle" }, drawing, Math.round(most * tick / 4));
    }
    svg("text", { x: left + (width - left - right) / 2, y: height - 10, class: "tick middle" }, drawing, "optimiser steps from base");
  }
  chosen.addEventListener("change", draw);
  draw();
})();
