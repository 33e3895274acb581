// A slider over the points of a series: what each use keeps there.
const sweeps = () => {
  for (const box of $$("[data-sweep]")) {
    const { series } = data.sweeps[box.dataset.sweep];
    const pick = { series: $("[data-series]", box), point: $("[data-point]", box) };
    const table = $("table", box.parentElement.querySelector(`[data-points="${box.dataset.sweep}"]`));
    fill(pick.series, series.map((one, i) => [i, one.name]));
    const write = () => {
      const point = series[pick.series.value].points[pick.point.value];
      pick.point.setAttribute("aria-valuetext", `${point.point}: ${point.words}`);
      const head = make("p");
      head.append(make("b", point.point), `: ${point.words}`);
      const bars = make("div", undefined, { class: "bars" });
      for (const use of point.uses) {
        const bar = make("span", undefined, { class: "kept-bar" }), fillIn = make("span");
        fillIn.style.width = `${100 * Math.max(0, Math.min(1, use.kept))}%`;
        fillIn.style.background = use.colour;
        bar.append(fillIn);
        const interval = use.low === null ? "" : ` (${use.low.toFixed(2)} to ${use.high.toFixed(2)})`;
        bars.append(make("span", use.name), bar, make("span", `keeps ${use.kept.toFixed(2)}${interval}, loses ${(100 * (1 - use.kept)).toFixed(0)} %`, { "data-kept": use.kept }));
      }
      $("[data-at]", box).replaceChildren(head, bars);
      for (const row of $$("tbody tr", table)) row.classList.toggle("own", row.dataset.name === point.point);
    };
    const options = () => {
      pick.point.max = series[pick.series.value].points.length - 1;
      pick.point.value = Math.min(pick.point.value, pick.point.max);
      write();
    };
    pick.series.addEventListener("change", options);
    pick.point.addEventListener("input", write);
    options();
  }
};
