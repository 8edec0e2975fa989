/* Where a change is expressed and where it is stored, head by head. */
(() => {
  const store = document.getElementById("places-data");
  if (!store) return;
  const maps = page.read("places-data");
  for (const box of document.querySelectorAll("[data-map]")) {
    const { values, layers, heads, bound, label, what } = maps[box.dataset.map];
    page.heatMap(box, layers, heads, bound, label, what).paint(values);
  }
})();
