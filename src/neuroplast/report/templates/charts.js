/* The charts that plotly.js draws, in the colours of the page. */
(() => {
  const charts = page.read("charts");
  const coarse = matchMedia("(pointer: coarse)").matches;
  const drawn = new Set();
  const { colour } = page;

  function themed(spec) {
    const scale = page.scales[page.isDark() ? "dark" : "light"];
    const layout = structuredClone(spec.layout), data = structuredClone(spec.data);
    Object.assign(layout, {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", dragmode: coarse ? false : "zoom",
      modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("strong-line"), activecolor: colour("accent") },
      font: { family: colour("sans"), size: 12.5, color: colour("text") },
      hoverlabel: { bgcolor: colour("surface"), bordercolor: colour("strong-line"), font: { color: colour("text"), family: colour("sans") } },
    });
    for (const key of Object.keys(layout)) {
      if (!/^[xy]axis/.test(key)) continue;
      Object.assign(layout[key], { gridcolor: colour("line"), zerolinecolor: colour("strong-line"), color: colour("muted"), fixedrange: coarse });
    }
    if (layout.coloraxis) {
      layout.coloraxis.colorscale = scale.map((c, i) => [i / (scale.length - 1), c]);
    }
    for (const trace of data) {
      if (!trace.meta) continue;
      const c = colour(trace.meta.kind);
      if (trace.line) trace.line.color = c;
      if (trace.marker) trace.marker.color = c;
      if (trace.error_y) trace.error_y.color = c;
    }
    return [data, layout];
  }

  function draw(element) {
    const [data, layout] = themed(charts[element.dataset.chart]);
    Plotly.react(element, data, layout, {
      responsive: true, displaylogo: false, modeBarButtons: [["toImage", "resetScale2d"]],
    });
    drawn.add(element);
  }

  for (const element of document.querySelectorAll(".chart")) {
    const folded = element.closest("details");
    if (!folded) draw(element);
    else folded.addEventListener("toggle", () => folded.open && draw(element));
  }
  page.onTheme(() => drawn.forEach(draw));
})();
