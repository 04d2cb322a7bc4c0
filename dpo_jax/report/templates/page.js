/* The value under the pointer, in the legend. Without it (or with scripts off) the legend shows the last values. */
for (const figure of document.querySelectorAll("figure[data-series]")) {
  const lines = JSON.parse(figure.dataset.series);
  const [low, high] = figure.dataset.domain.split(" ").map(Number);
  const plot = figure.querySelector(".plot"), rule = figure.querySelector(".rule");
  const outputs = [...figure.querySelectorAll("output")], last = outputs.map(o => o.textContent);
  const nearest = (points, x) => points.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a);
  plot.addEventListener("pointermove", event => {
    const box = plot.getBoundingClientRect();
    const x = low + (high - low) * (event.clientX - box.left) / box.width;
    const shown = lines.map(points => nearest(points, x));
    const at = shown.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a)[0];
    shown.forEach(([, y], i) => { outputs[i].textContent = String(Number(y.toPrecision(4))).replace("-", "−"); });
    rule.dataset.at = figure.dataset.unit + " " + at;
    rule.style.left = 100 * (at - low) / (high - low) + "%";
    figure.classList.add("hover");
  });
  plot.addEventListener("pointerleave", () => {
    figure.classList.remove("hover");
    outputs.forEach((output, i) => { output.textContent = last[i]; });
  });
}
