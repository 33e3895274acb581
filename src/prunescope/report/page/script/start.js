const theme = $("#theme"), THEMES = ["system", "light", "dark"];
let current = 0;
const recolour = () => { for (const figure of charts.keys()) waiting.add(figure); work(); };
theme.addEventListener("click", () => {
  current = (current + 1) % 3;
  const name = THEMES[current];
  if (current) document.documentElement.dataset.theme = name; else delete document.documentElement.dataset.theme;
  theme.textContent = `Colours: ${name}`;
  recolour();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recolour);
let wide = narrow();
window.addEventListener("resize", () => { if (narrow() !== wide) { wide = narrow(); recolour(); } });
// On paper: light whatever the screen is, and no wider than a sheet.
const SHEET = 670;
const forAll = (change) => { for (const chart of $$(".chart")) if (chart.layout) Plotly.relayout(chart, change(chart)); };
const axes = (chart, colour, line) => Object.fromEntries(Object.keys(chart.layout).filter((name) => /^[xy]axis/.test(name)).flatMap((name) => [[`${name}.gridcolor`, colour], [`${name}.zerolinecolor`, colour], [`${name}.linecolor`, line]]));
window.addEventListener("beforeprint", () => forAll((chart) => ({ autosize: false, width: Math.min(SHEET, chart.clientWidth || SHEET), "font.color": "#000000", ...axes(chart, "#e3e5e9", "#d5d8de") })));
window.addEventListener("afterprint", () => forAll((chart) => ({ width: null, autosize: true, "font.color": css("--ink"), ...axes(chart, css("--grid"), css("--line")) })));
// Parts of the page are built one after the other, so that it answers in between.
(async () => {
  for (const build of [layers, decoding, choices, targets, passages, sweeps, checkpoints, links]) { build(); await tick(); }
  work();
})();
