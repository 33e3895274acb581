// Text of models only ever becomes text content, or passes through `plain` on its way into a chart.
const data = JSON.parse(document.getElementById("data").textContent);
const SPACES = { h: "hidden state h", z: "logits z", p: "probabilities p" };
const KINDS = ["attention", "MLP"];
const COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#9467BD"];
const DENSE = "#0072B2", TARGET = "#D55E00";
const PAIRS = { p_cos_dev: "p_cos_dev_est", kl_dense_target: "kl_est", h_cos_dev: "h_cos_dev_est", z_cos_dev: "z_cos_dev_est" };
const STATS = { mean: 0, p5: 1, p95: 2 };
const space = Object.fromEntries(data.columns.map((c) => [c.name, c.space]));
const $ = (query, root = document) => root.querySelector(query);
const $$ = (query, root = document) => [...root.querySelectorAll(query)];
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const tick = () => new Promise((done) => setTimeout(done));

const make = (tag, text, attributes = {}) => {
  const element = document.createElement(tag);
  if (text !== undefined && text !== null) element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
};
// Plotly reads a few tags in its texts; control and direction marks would garble a label.
const plain = (text) => String(text).replace(/[\u200e\u200f\u202a-\u202e\u2066-\u2069]/g, "\u00b7")
  .replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;").replace(/\n/g, "\u21b5").replace(/\$/g, "&#36;");
const label = (text, length = 14) => {
  const shown = [...String(text).replace(/ /g, "\u2423")];
  return plain(shown.length > length ? shown.slice(0, length - 1).join("") + "\u2026" : shown.join("")) || "(empty)";
};
const visible = (text) => (text === "" ? "(empty)" : String(text).replace(/\n/g, "\u21b5\n").replace(/\t/g, "\u21e5\t"));
const digits = (value) => (value === null || value === undefined || Number.isNaN(value) ? "\u2013" : Number(value) === 0 ? "0" : Number(Number(value).toPrecision(6)).toString());

// The chance of coming up at least once in n independent draws.
const atLeastOnce = (p, n) => (p >= 1 ? 1 : -Math.expm1(n * Math.log1p(-p)));
// Both models' most likely tokens, side by side; `right` is the token that follows.
const mostLikely = (row, right) => {
  const box = make("div", undefined, { class: "two" });
  for (const side of ["dense", "target"]) {
    const table = make("table");
    table.append(make("caption", `${side}: most likely tokens`, { style: "text-align:left" }));
    for (const [token, p] of row[side]) {
      const line = make("tr", undefined, token === right ? { class: "right" } : {});
      line.append(make("td", visible(token.replace(/ /g, "\u2423")), { class: "text" }), make("td", p.toPrecision(4), { class: "n", "data-v": p }));
      table.append(line);
    }
    box.append(table);
  }
  return box;
};
// A listbox: pointing at an item, a click and the arrow keys choose it; `choose(number, scroll)` shows it.
const walked = (list, current, choose) => {
  const at = (event) => { const item = event.target.closest("li"); if (item) choose([...list.children].indexOf(item)); };
  for (const name of ["mouseover", "click"]) list.addEventListener(name, at);
  list.addEventListener("keydown", (event) => {
    const last = list.children.length - 1, here = current();
    const to = { ArrowRight: here + 1, ArrowDown: here + 1, ArrowLeft: here - 1, ArrowUp: here - 1, Home: 0, End: last }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    choose(Math.max(0, Math.min(last, to)), true);
  });
};

// --- packed numbers -------------------------------------------------------------------------------------------------

const unpacked = new WeakMap();
const unpack = (blob) => {
  if (!unpacked.has(blob)) unpacked.set(blob, (async () => {
    const text = atob(blob.data);
    const packed = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) packed[i] = text.charCodeAt(i);
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    const bytes = new Uint8Array(await new Response(stream).arrayBuffer());
    const width = blob.dtype === "f4" ? 4 : 8, count = bytes.length / width;
    const view = new DataView(new ArrayBuffer(bytes.length));
    for (let b = 0; b < width; b++) for (let i = 0; i < count; i++) view.setUint8(i * width + b, bytes[b * count + i]);
    const values = new Array(count);
    for (let i = 0; i < count; i++) values[i] = width === 4 ? view.getFloat32(4 * i, true) : view.getFloat64(8 * i, true);
    return values;
  })());
  return unpacked.get(blob);
};
const gap = (value) => (Number.isNaN(value) ? null : value);
const cut = (values, from, count) => values.slice(from, from + count).map(gap);

// --- charts: one after the other, each in a task of its own, those in sight first ---------------------------------------

const charts = new Map(); // figure -> {draw, rows}
const waiting = new Set();
let busy = false;
const near = new Set();
const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) entry.isIntersecting ? near.add(entry.target) : near.delete(entry.target);
  work();
}, { rootMargin: "300px" });
const add = (name, draw, figure = $(`[data-chart="${name}"]`)) => {
  if (!figure) return;
  charts.set(figure, { draw, rows: [] });
  seen.observe(figure);
  waiting.add(figure);
};
const redraw = (...names) => {
  for (const figure of charts.keys()) if (names.includes(figure.dataset.chart)) waiting.add(figure);
  work();
};
const work = async () => {
  if (busy) return;
  busy = true;
  while (waiting.size) {
    const figure = [...waiting].find((one) => near.has(one)) || [...waiting][0];
    waiting.delete(figure);
    await tick();
    try {
      await charts.get(figure).draw(figure, charts.get(figure));
      figure.dataset.drawn = String(Number(figure.dataset.drawn || 0) + 1);
    } catch (error) {
      console.error(`chart ${figure.dataset.chart}:`, error);
    }
  }
  busy = false;
  document.documentElement.dataset.ready = "true";
};

const look = () => ({ ink: css("--ink"), soft: css("--soft"), grid: css("--grid"), panel: css("--panel"), line: css("--line") });
const axis = (c, more = {}) => ({ gridcolor: c.grid, zerolinecolor: c.grid, linecolor: c.line, tickcolor: c.line, automargin: true, exponentformat: "power", ...more, ...(typeof more.title === "string" ? { title: { text: more.title, standoff: 8 } } : {}) });
const layout = (more) => {
  const c = look();
  const result = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: c.ink, size: 12, family: "system-ui, sans-serif" },
    margin: { l: 56, r: 14, t: 30, b: 44 }, hoverlabel: { bgcolor: c.panel, bordercolor: c.line, font: { color: c.ink }, align: "left" },
    legend: { orientation: "h", x: 0, y: 1.03, yanchor: "bottom", font: { size: 11 } }, ...more,
  };
  for (const name of Object.keys(result)) if (/^[xy]axis/.test(name)) result[name] = axis(c, result[name]);
  return result;
};
const say = (figure, text) => {
  $("[data-caption]", figure).textContent = text;
  for (const chart of $$(".chart", figure)) { chart.setAttribute("role", "img"); chart.setAttribute("aria-label", text); }
};
const plot = (figure, traces, how, height) => {
  const chart = $(".chart", figure);
  const fresh = !chart.data;
  chart.style.minHeight = `${height || (chart.classList.contains("tall") ? 340 : 260)}px`;
  return Plotly.react(chart, traces, layout({ height: height || (chart.classList.contains("tall") ? 340 : 260), ...how }), { displayModeBar: false, responsive: true }).then(() => fresh);
};
const narrow = () => window.innerWidth < 720;
const wrapTitle = (text) => ({ text: plain(text), font: { size: 12 }, x: 0, xanchor: "left" });
const panelTitle = (text, xref, yref) => ({ text: plain(text), showarrow: false, xref: `${xref} domain`, yref: `${yref} domain`, x: 0, y: 1.04, yanchor: "bottom", xanchor: "left" });

const download = (name, content, type) => {
  const link = make("a", undefined, { download: name, href: URL.createObjectURL(new Blob([content], { type })) });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
};
// A cell that a spreadsheet would take for a formula gets an apostrophe in front.
const field = (value) => {
  let text = value === null || value === undefined || Number.isNaN(value) ? "" : String(value);
  if (typeof value === "string" && /^[=+\-@\t\r]/.test(text) && Number.isNaN(Number(text))) text = `'${text}`;
  return /[",\n\r]/.test(text) ? `"${text.replace(/"/g, '""')}"` : text;
};
const csv = (rows) => "\ufeff" + rows.map((row) => row.map(field).join(",")).join("\r\n") + "\r\n";
const saveFigure = async (figure, kind) => {
  const name = `prunescope-${figure.dataset.chart}`;
  if (kind === "csv") return download(`${name}.csv`, csv(charts.get(figure).rows), "text/csv");
  const parts = $$(".chart", figure);
  for (const [i, chart] of parts.entries()) {
    const box = chart.getBoundingClientRect();
    const url = await Plotly.toImage(chart, { format: "svg", width: Math.max(box.width, 400), height: Math.max(box.height, 150) });
    download(parts.length > 1 ? `${name}-${i + 1}.svg` : `${name}.svg`, decodeURIComponent(url.slice(url.indexOf(",") + 1)), "image/svg+xml");
  }
};
for (const button of $$("[data-save]")) button.addEventListener("click", () => saveFigure(button.closest("figure"), button.dataset.save));
for (const button of $$("[data-save-table]")) button.addEventListener("click", () => {
  const table = $(`table[data-${button.dataset.saveTable}]`);
  download(`prunescope-${button.dataset.saveTable}.csv`, csv($$("tr", table).map((row) => [...row.children].map((cell) => (cell.dataset.v !== undefined ? cell.dataset.v : cell.textContent)))), "text/csv");
});

const fill = (select, entries, chosen) => {
  select.replaceChildren(...entries.map(([value, text]) => make("option", text, { value })));
  if (chosen !== undefined && entries.some(([value]) => String(value) === String(chosen))) select.value = String(chosen);
};
const metrics = (select, columns, chosen) => {
  select.replaceChildren();
  for (const [key, title] of [...Object.entries(SPACES), ["", "other"]]) {
    const found = columns.filter((name) => (space[name] || "") === key);
    if (!found.length) continue;
    const group = make("optgroup", undefined, { label: title });
    group.append(...found.map((name) => make("option", name, { value: name })));
    select.append(group);
  }
  if (columns.includes(chosen)) select.value = chosen;
};
const of = (command) => data.runs.filter((run) => run.command === command);
const positive = (values) => values.map((value) => (value > 0 ? value : null));
const allPositive = (values) => values.every((value) => value === null || value >= 0) && values.some((value) => value > 0);

// An axis made for the means: what a band has below it, zeros too, ends at the lower edge.
const onLog = (traces, means) => {
  const known = means.filter((value) => value > 0);
  const low = known.reduce((a, b) => Math.min(a, b), Infinity) / 100;
  const high = traces.flatMap((trace) => trace.y).reduce((a, b) => Math.max(a, b ?? 0), 0);
  for (const trace of traces) trace.y = trace.y.map((value) => (value === null || value === undefined ? null : value > low ? value : trace.line.width ? (value > 0 ? value : null) : low));
  return [Math.log10(low), Math.log10(high) + 0.1];
};
const lineWithBand = (x, mean, low, high, name, colour, more = {}) => [
  { x, y: high, mode: "lines", line: { width: 0 }, hoverinfo: "skip", showlegend: false, legendgroup: name, ...more },
  { x, y: low, mode: "lines", line: { width: 0 }, fill: "tonexty", fillcolor: colour + "26", hoverinfo: "skip", showlegend: false, legendgroup: name, ...more },
  { x, y: mean, mode: "lines+markers", line: { color: colour, width: 2, dash: more.dash }, marker: { size: mean.filter((v) => v !== null).length < 6 ? 8 : 4, color: colour }, name: plain(name), legendgroup: name, hovertemplate: "%{x}: %{y:.6g}", ...more },
];
