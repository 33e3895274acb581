"use strict";
(() => {
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

  // --- layers ----------------------------------------------------------------------------------------------------------

  const layers = () => {
    const part = $('[data-part="layerwise"]');
    if (!part) return;
    const runs = of("layerwise");
    const pick = { run: $("[data-run]", part), metric: $("[data-metric]", part), prompt: $("[data-prompt]", part), scale: $("[data-scale]", part), pair: $("[data-pair]", part), kind: $("[data-kind]", part) };
    const cell = Object.fromEntries($$("[data-cell]", part).map((input) => [input.dataset.cell, input]));
    fill(pick.run, runs.map((run, i) => [i, run.name]));
    const run = () => runs[pick.run.value];
    let grid = null; // {values, steps, tokens, columns}
    const options = () => {
      const view = run().view, metric = pick.metric.value || "kl_dense_target", prompt = pick.prompt.value;
      metrics(pick.metric, view.columns, metric);
      fill(pick.prompt, [["mean", `mean over ${view.prompt_count} prompts`], ...view.prompts.map((p, i) => [i, `prompt ${p.id}`])], prompt);
      cell.layer.max = view.layers - 1;
    };
    const load = async () => {
      const view = run().view, metric = pick.metric.value;
      if (pick.prompt.value === "mean") return { values: await unpack(view.means[metric]), steps: view.steps, tokens: null };
      const one = view.prompts[pick.prompt.value];
      if (!one.cells[metric]) return { values: null, steps: Array.from({ length: one.steps }, (_, i) => i), tokens: one.tokens };
      return { values: await unpack(one.cells[metric]), steps: Array.from({ length: one.steps }, (_, i) => i), tokens: one.tokens };
    };
    const token = (t) => (grid.tokens ? grid.tokens[t] : null);
    const read = () => {
      const box = $('[data-readout="heat"]', part);
      box.replaceChildren();
      if (!grid || !grid.values) return;
      const { layers } = run().view, steps = grid.steps.length;
      const t = grid.steps.indexOf(Number(cell.step.value)), layer = Number(cell.layer.value), kind = Number(cell.kind.value);
      if (t < 0 || !(layer >= 0 && layer < layers)) return box.append(`No cell here: layers 0 to ${layers - 1}, steps ${grid.steps[0]} to ${grid.steps[steps - 1]}${run().view.stride > 1 && !grid.tokens ? `, every ${run().view.stride}` : ""}.`);
      const value = grid.values[(kind * layers + layer) * steps + t];
      box.append(make("span", `${KINDS[kind]} of layer ${layer}, step ${cell.step.value}: ${pick.metric.value} = `), make("b", digits(value), { "data-v": value }));
      if (token(t) !== null) box.append(make("span", "; token that follows: "), make("code", visible(token(t)), { class: "text" }));
    };
    add("heat", async (figure, chart) => {
      grid = await load();
      const view = run().view, name = pick.metric.value, steps = grid.steps.length;
      if (!grid.values) {
        say(figure, `${name} is kept as a mean over prompts only; single prompts have ${Object.keys(view.prompts[0].cells).join(", ")}.`);
        return Plotly.purge($(".chart", figure));
      }
      const log = pick.scale.value === "log" && allPositive(grid.values.map(gap));
      const found = grid.values.filter((v) => (log ? v > 0 : Number.isFinite(v))).map((v) => (log ? Math.log10(v) : v));
      const sorted = found.slice().sort((a, b) => a - b);
      // a few tiny cells would take the colours from all others
      const low = sorted.length ? sorted[Math.floor(log ? 0.01 * sorted.length : 0)] : 0, high = sorted.length ? sorted[sorted.length - 1] : 1;
      const tall = narrow();
      const traces = KINDS.map((kind, k) => {
        const z = [], text = [];
        for (let layer = 0; layer < view.layers; layer++) {
          const row = cut(grid.values, (k * view.layers + layer) * steps, steps);
          z.push(row.map((v) => (v === null ? null : log ? (v > 0 ? Math.log10(v) : null) : v)));
          text.push(row.map((v, t) => digits(v) + (grid.tokens ? `<br>token ${label(grid.tokens[t], 40)}` : "")));
        }
        return { type: "heatmap", x: grid.steps, z, text, xaxis: k ? "x2" : "x", yaxis: k ? "y2" : "y", coloraxis: "coloraxis", hoverongaps: false, hovertemplate: `${kind}, layer %{y}, step %{x}<br>${name} = %{text}<extra></extra>` };
      });
      const ticks = log ? Array.from({ length: Math.max(0, Math.floor(high) - Math.ceil(low) + 1) }, (_, i) => Math.ceil(low) + i) : null;
      const every = ticks ? Math.max(1, Math.ceil(ticks.length / 7)) : 1;
      const bar = { title: { text: name, side: "right" }, thickness: 12, len: 1, outlinewidth: 0, ...(ticks && ticks.length > 1 ? { tickvals: ticks.filter((_, i) => i % every === 0), ticktext: ticks.filter((_, i) => i % every === 0).map((t) => `10<sup>${t}</sup>`) } : log ? { tickvals: [low, high], ticktext: [10 ** low, 10 ** high].map((v) => v.toPrecision(2)) } : {}) };
      const height = Math.min(620, Math.max(300, 12 * view.layers + 90));
      const fresh = await plot(figure, traces, {
        height: tall ? 1.7 * height : height, margin: { l: 50, r: 10, t: 30, b: 44 }, coloraxis: { colorscale: "Viridis", cmin: low, cmax: high, colorbar: bar },
        grid: tall ? { rows: 2, columns: 1, pattern: "independent", ygap: 0.25 } : { rows: 1, columns: 2, pattern: "independent", xgap: 0.1 },
        xaxis: { title: "decoding step" }, xaxis2: { title: "decoding step" }, yaxis: { title: "layer" }, yaxis2: {},
        annotations: KINDS.map((kind, k) => panelTitle(kind, k ? "x2" : "x", k ? "y2" : "y")),
      }, tall ? 1.7 * height : height);
      if (fresh) for (const event of ["plotly_hover", "plotly_click"]) $(".chart", figure).on(event, ({ points: [point] }) => {
        [cell.kind.value, cell.layer.value, cell.step.value] = [point.curveNumber, point.y, point.x];
        read();
      });
      const kept = view.stride > 1 && !grid.tokens ? `; every ${view.stride}. step is kept` : "";
      const some = view.prompts.length < view.prompt_count ? `; ${view.prompts.length} of ${view.prompt_count} prompts are kept one by one` : "";
      say(figure, `${name} by layer and decoding step, ${grid.tokens ? `prompt ${view.prompts[pick.prompt.value].id}` : `mean over ${view.prompt_count} prompts`}; lens ${run().lens}, T = ${run().temperature}${kept}${some}. ${log ? "The lowest 1 % of the cells share the darkest colour. " : ""}Blank: not there${log ? ", or exactly zero" : ""}.`);
      chart.rows = [["sublayer", "layer", "step", name], ...grid.values.map((v, i) => [KINDS[Math.floor(i / steps / view.layers)], Math.floor(i / steps) % view.layers, grid.steps[i % steps], v])];
      read();
    });
    add("layers", async (figure, chart) => {
      const name = pick.metric.value, traces = [], all = [];
      chart.rows = [["run", "sublayer", "layer", "mean", "p5", "p95", "min", "max"]];
      for (const [i, one] of runs.entries()) {
        if (!one.view.by_layer[name]) continue;
        const stats = await unpack(one.view.by_layer[name]), count = one.view.layers;
        for (let k = 0; k < 2; k++) {
          const take = (s) => cut(stats, (s * 2 + k) * count, count).map((v, layer) => (one.view.changed[one.view.kinds[k]].includes(layer) ? v : null));
          const [mean, low, high] = Object.values(STATS).map(take);
          const x = mean.map((_, layer) => layer);
          all.push(...mean);
          traces.push(...lineWithBand(x, mean, low, high, one.name + (runs.some((other) => other.lens !== one.lens) && !one.name.includes("lens") ? `, lens ${one.lens}` : ""), COLOURS[i % COLOURS.length], { xaxis: k ? "x2" : "x", yaxis: k ? "y2" : "y", connectgaps: false }).map((t) => ({ ...t, showlegend: t.showlegend === false ? false : k === 0 })));
          for (const layer of x) chart.rows.push([one.name, KINDS[k], layer, ...[0, 1, 2, 3, 4].map((s) => stats[(s * 2 + k) * count + layer])]);
        }
      }
      const log = pick.scale.value === "log" && allPositive(all);
      const range = log ? onLog(traces, all) : undefined;
      const tall = narrow();
      await plot(figure, traces, {
        grid: tall ? { rows: 2, columns: 1, pattern: "independent", ygap: 0.3 } : { rows: 1, columns: 2, pattern: "independent", xgap: 0.1 },
        xaxis: { title: "layer" }, xaxis2: { title: "layer" }, yaxis: { type: log ? "log" : "linear", title: name, range }, yaxis2: { type: log ? "log" : "linear", matches: "y", range },
        annotations: KINDS.map((kind, k) => panelTitle(kind, k ? "x2" : "x", k ? "y2" : "y")), legend: { orientation: "h", x: 0, y: tall ? 1.07 : 1.11, yanchor: "bottom", font: { size: 11 } }, showlegend: true,
      }, tall ? 600 : 390);
      say(figure, `${name} by layer, for every layerwise run on the page; line: mean over prompts and steps, band: 5th to 95th percentile. Sublayers that a target leaves as they are have no point.`);
    });
    add("multiples", async (figure, chart) => {
      const view = run().view, truth = pick.pair.value, estimate = PAIRS[truth], k = Number(pick.kind.value);
      const changed = view.changed[view.kinds[k]], steps = view.steps.length;
      const [a, b] = [await unpack(view.means[truth]), await unpack(view.means[estimate])];
      const row = (values, layer) => positive(cut(values, (k * view.layers + layer) * steps, steps));
      const known = changed.flatMap((layer) => [...row(a, layer), ...row(b, layer)]).filter((v) => v !== null);
      const range = [Math.log10(known.reduce((x, y) => Math.min(x, y), Infinity)) - 0.2, Math.log10(known.reduce((x, y) => Math.max(x, y), 0)) + 0.2];
      const across = narrow() ? 2 : 6, box = $(".rows", figure);
      const lines = Array.from({ length: Math.ceil(changed.length / across) }, (_, i) => changed.slice(i * across, (i + 1) * across));
      for (const old of $$(".chart", box).slice(lines.length)) { Plotly.purge(old); old.remove(); }
      while ($$(".chart", box).length < lines.length) box.append(make("div", undefined, { class: "chart" }));
      chart.rows = [["sublayer", "layer", "step", truth, estimate]];
      for (const [number, some] of lines.entries()) {
        const traces = [], how = { showlegend: number === lines.length - 1, height: number === lines.length - 1 ? 180 : 145, margin: { l: 48, r: 8, t: 24, b: number === lines.length - 1 ? 66 : 22 }, legend: { orientation: "h", x: 0, y: -0.42, yanchor: "top" }, annotations: [] };
        some.forEach((layer, i) => {
          const n = i ? i + 1 : "";
          const wide = 1 / across;
          how[`xaxis${n}`] = { domain: [i * wide, (i + 0.86) * wide], anchor: `y${n}`, range: [-0.5, view.steps[steps - 1] + 0.5], nticks: 4 };
          how[`yaxis${n}`] = { type: "log", range, anchor: `x${n}`, showticklabels: i === 0, nticks: 4 };
          how.annotations.push({ ...panelTitle(`layer ${layer}`, `x${n}`, `y${n}`), font: { size: 11 }, y: 1 });
          const [t, e] = [row(a, layer), row(b, layer)];
          const shared = { x: view.steps, xaxis: `x${n}`, yaxis: `y${n}`, mode: "lines+markers", marker: { size: 3 }, showlegend: i === 0 };
          traces.push({ ...shared, y: t, name: "measured", legendgroup: "a", line: { color: DENSE, width: 1.5 }, hovertemplate: "step %{x}: %{y:.6g}" });
          traces.push({ ...shared, y: e, name: "second-order estimate", legendgroup: "b", line: { color: TARGET, width: 1.5, dash: "dot" }, hovertemplate: "step %{x}: %{y:.6g}" });
          t.forEach((v, s) => chart.rows.push([KINDS[k], layer, view.steps[s], v, e[s]]));
        });
        const target = $$(".chart", box)[number];
        target.style.minHeight = `${how.height}px`;
        await tick();
        await Plotly.react(target, traces, layout(how), { displayModeBar: false, responsive: true });
      }
      say(figure, changed.length ? `${truth} (measured) and ${estimate} (second-order estimate) by decoding step, one panel a layer on one scale, mean over prompts; noise floor ${digits(run().floor[truth])}.` : `The target changes no ${KINDS[k]} sublayer.`);
    });
    options();
    pick.run.addEventListener("change", () => { options(); redraw("heat", "multiples"); });
    pick.prompt.addEventListener("change", () => redraw("heat"));
    for (const name of ["metric", "scale"]) pick[name].addEventListener("change", () => redraw("heat", "layers"));
    for (const name of ["pair", "kind"]) pick[name].addEventListener("change", () => redraw("multiples"));
    for (const input of Object.values(cell)) input.addEventListener("input", read);
  };

  // --- decoding --------------------------------------------------------------------------------------------------------

  const decoding = () => {
    const part = $('[data-part="generate"]');
    if (!part) return;
    const runs = of("generate"), LINES = { "free-running": "solid", "teacher-forced": "dash" }, PAGE = 400;
    const pick = Object.fromEntries(["run", "prompt", "colour", "regime", "metric"].map((name) => [name, $(`[data-${name}]`, part)]));
    const list = $("[data-tokens]", part), readout = $('[data-readout="step"]', part), more = $("[data-more]", part);
    fill(pick.run, runs.map((run, i) => [i, run.name]));
    metrics(pick.metric, [...new Set(runs.flatMap((run) => run.view.columns))], "kl_dense_target");
    const run = () => runs[pick.run.value];
    const text = () => run().view.texts[pick.prompt.value];
    let chosen = -1, shown = PAGE;
    const rows = () => text()[pick.regime.value];
    const choose = (step, scroll) => {
      const items = $$("li", list);
      if (items[chosen]) items[chosen].setAttribute("aria-selected", "false");
      chosen = step;
      readout.replaceChildren();
      if (!items[step]) return readout.append("Point at a step, or walk with the arrow keys, to see the most likely tokens of both models.");
      items[step].setAttribute("aria-selected", "true");
      list.setAttribute("aria-activedescendant", items[step].id);
      if (scroll) items[step].scrollIntoView({ block: "nearest" });
      const row = rows()[step];
      const head = make("div", `Step ${step}: `);
      readout.append(head);
      if (!row) return head.append("one of the texts has ended; there is nothing to compare.");
      head.append(make("span", "KL = "), make("b", digits(row.kl), { "data-v": row.kl }), make("span", ` nats, ${row.same ? "same" : "another"} most likely token`));
      if (!row.dense) return head.append("; this run was made before most likely tokens were kept");
      const box = make("div", undefined, { class: "two" });
      for (const side of ["dense", "target"]) {
        const table = make("table");
        table.append(make("caption", `${side}: most likely tokens`, { style: "text-align:left" }));
        for (const [token, p] of row[side]) {
          const line = make("tr");
          line.append(make("td", visible(token.replace(/ /g, "\u2423")), { class: "text" }), make("td", p.toPrecision(4), { class: "n", "data-v": p }));
          table.append(line);
        }
        box.append(table);
      }
      readout.append(box);
    };
    const write = () => {
      const one = text(), count = Math.max(one.dense.length, one.target ? one.target.length : 0);
      const strongest = rows().reduce((m, row) => Math.max(m, row ? row.kl : 0), 1e-12);
      $("[data-prompt-text]", part).textContent = one.prompt;
      list.replaceChildren();
      for (let t = 0; t < Math.min(count, shown); t++) {
        const row = rows()[t], parted = one.first !== null && one.first !== undefined && t >= one.first;
        const item = make("li", undefined, { role: "option", id: `step-${t}`, "aria-selected": "false" });
        for (const pieces of [one.dense, one.target]) {
          const piece = pieces ? pieces[t] : undefined;
          item.append(make("span", piece === undefined ? "\u00a0" : visible(piece)));
        }
        if (parted) item.classList.add("parted");
        const alpha = !row ? 0 : pick.colour.value === "same" ? (row.same ? 0 : 0.4) : 0.5 * Math.sqrt(row.kl / strongest);
        item.style.background = `rgba(var(--mark), ${alpha.toFixed(3)})`;
        list.append(item);
      }
      more.hidden = count <= shown;
      choose(-1);
    };
    const options = () => {
      const view = run().view;
      fill(pick.prompt, view.texts.map((one, i) => [i, `prompt ${one.id}`]), pick.prompt.value || view.texts.map((t, i) => [t.dense.length, i]).sort((x, y) => y[0] - x[0])[0][1]);
      const known = [["free", "free-running", "its own text"], ["forced", "teacher-forced", "the dense text"]].filter(([, name]) => name in view.regimes);
      fill(pick.regime, known.map(([value, , words]) => [value, words]), pick.regime.value);
    };
    list.addEventListener("mouseover", (event) => { const item = event.target.closest("li"); if (item) choose($$("li", list).indexOf(item)); });
    list.addEventListener("click", (event) => { const item = event.target.closest("li"); if (item) choose($$("li", list).indexOf(item)); });
    list.addEventListener("keydown", (event) => {
      const last = list.children.length - 1;
      const to = { ArrowRight: chosen + 1, ArrowDown: chosen + 1, ArrowLeft: chosen - 1, ArrowUp: chosen - 1, Home: 0, End: last }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      choose(Math.max(0, Math.min(last, to)), true);
    });
    more.addEventListener("click", () => { shown += PAGE; write(); });
    add("steps", async (figure, chart) => {
      const name = pick.metric.value, traces = [], all = [];
      chart.rows = [["run", "regime", "step", "prompts", "mean", "p5", "p95", "min", "max"]];
      for (const [i, one] of runs.entries()) for (const [regime, found] of Object.entries(one.view.regimes)) {
        if (!found.by_step[name]) continue;
        const stats = await unpack(found.by_step[name]), count = one.view.steps.length;
        const [mean, low, high] = Object.values(STATS).map((s) => cut(stats, s * count, count));
        all.push(...mean);
        traces.push(...lineWithBand(one.view.steps, mean, low, high, `${one.name}, ${regime}`, COLOURS[i % COLOURS.length]).slice(regime === "free-running" || !one.view.regimes["free-running"] ? 0 : 2).map((t) => (t.mode === "lines+markers" ? { ...t, mode: "lines", line: { ...t.line, dash: LINES[regime] } } : t)));
        one.view.steps.forEach((step, t) => chart.rows.push([one.name, regime, step, found.prompts[t], ...[0, 1, 2, 3, 4].map((s) => stats[s * count + t])]));
      }
      const log = allPositive(all) && !/agree|overlap|_cos$|tv|confidence|centred/.test(name);
      const range = log ? onLog(traces, all) : undefined;
      await plot(figure, traces, { xaxis: { title: "decoding step" }, yaxis: { title: name, type: log ? "log" : "linear", range } }, 380);
      say(figure, `${name} by decoding step; line: mean over the prompts that have the step (solid free-running, dashed teacher-forced), band: 5th to 95th percentile of the solid line.`);
    });
    add("survival", async (figure, chart) => {
      chart.rows = [["run", "step", "share"]];
      const traces = runs.map((one, i) => [one, i]).filter(([one]) => one.view.survival).map(([one, i]) => {
        one.view.survival.forEach((v, t) => chart.rows.push([one.name, t, v]));
        return { y: one.view.survival, mode: "lines", line: { shape: "hv", color: COLOURS[i % COLOURS.length] }, name: plain(one.name), hovertemplate: "after step %{x}: %{y:.3f}" };
      });
      await plot(figure, traces, { showlegend: true, xaxis: { title: "decoding step" }, yaxis: { range: [-0.03, 1.03], title: "share of prompts" } }, 300);
      say(figure, "Survival of agreement: the share of prompts whose two texts are still the same after each step.");
    });
    add("history", async (figure, chart) => {
      const found = run().view.divergence;
      if (!found) return say(figure, "Local and history part need both regimes.");
      const x = found.by_step.map((row) => row.step);
      const line = (name, colour, what) => ({ x, y: found.by_step.map((row) => row[name]), mode: "lines", line: { color: colour, width: 2 }, name: what, hovertemplate: "step %{x}: %{y:.6g}" });
      await plot(figure, [line("total", look().ink, "total, free-running"), line("local", "#0072B2", "local: wrong in the dense context"), line("history", "#CC79A7", "history: its own text adds")], { showlegend: true, xaxis: { title: "decoding step" }, yaxis: { title: "mean KL, nats" } }, 300);
      say(figure, `${run().name}: KL of a step and its two parts (Eq. 67); over all steps ${digits(found.total)} = ${digits(found.local)} local + ${digits(found.history)} history. History may be negative.`);
      chart.rows = [["step", "prompts", "total", "local", "history"], ...found.by_step.map((row) => [row.step, row.prompts, row.total, row.local, row.history])];
    });
    add("confidence", async (figure, chart) => {
      chart.rows = [["run", "from", "to", "steps", "agreement", "low", "high"]];
      const traces = runs.map((one, i) => [one, i]).filter(([one]) => one.view.confidence).map(([one, i]) => {
        const rows = one.view.confidence.filter((row) => row.steps);
        for (const row of rows) chart.rows.push([one.name, row.from, row.to, row.steps, row.agreement, ...row.ci95]);
        return {
          x: rows.map((row) => `${row.from} to ${row.to}`), y: rows.map((row) => row.agreement), text: rows.map((row) => `${row.steps} steps`), mode: "markers", marker: { size: 8, color: COLOURS[i % COLOURS.length] }, name: plain(one.name),
          error_y: { type: "data", symmetric: false, array: rows.map((row) => row.ci95[1] - row.agreement), arrayminus: rows.map((row) => row.agreement - row.ci95[0]), thickness: 1.2 }, hovertemplate: "%{x}: %{y:.3f}, %{text}",
        };
      });
      await plot(figure, traces, { showlegend: true, scattermode: "group", xaxis: { title: "the dense model's confidence in its most likely token", type: "category", categoryorder: "array", categoryarray: runs[0].view.confidence ? runs[0].view.confidence.map((row) => `${row.from} to ${row.to}`) : [] }, yaxis: { range: [-0.03, 1.05], title: "same most likely token" } }, 330);
      say(figure, "Agreement by the dense model's confidence, teacher-forced, with Wilson's 95 % intervals.");
    });
    options();
    write();
    pick.run.addEventListener("change", () => { options(); shown = PAGE; write(); redraw("history"); });
    for (const name of ["prompt", "colour", "regime"]) pick[name].addEventListener("change", () => { shown = PAGE; write(); });
    pick.metric.addEventListener("change", () => redraw("steps"));
  };

  // --- options ---------------------------------------------------------------------------------------------------------

  const choices = () => {
    const part = $('[data-part="mcq"]');
    if (!part) return;
    const runs = of("mcq");
    const pick = Object.fromEntries(["run", "question", "metric"].map((name) => [name, $(`[data-${name}]`, part)]));
    fill(pick.run, runs.map((run, i) => [i, run.name]));
    metrics(pick.metric, runs[0].view.columns.filter((name) => !name.startsWith("h_")), "kl_dense_target");
    const run = () => runs[pick.run.value];
    const shares = (scores) => {
      const top = Math.max(...scores), p = scores.map((v) => Math.exp(v - top)), sum = p.reduce((a, b) => a + b, 0);
      return p.map((v) => v / sum);
    };
    const options = () => {
      const tops = run().view.tops, sorted = tops.map((q, i) => [q.kl, i]).sort((a, b) => a[0] - b[0]);
      fill(pick.question, tops.map((q, i) => [i, `${q.id} (KL ${digits(q.kl)})`]), pick.question.value || sorted[Math.floor(sorted.length / 2)][1]);
      const body = $("[data-flips] tbody", part);
      body.replaceChildren(...run().view.flips.map((q) => {
        const row = make("tr");
        const named = (i) => `${q.letters[i] ?? i}: ${q.choices[i] ?? ""}`;
        row.append(make("th", q.id, { scope: "row", class: "text" }));
        for (const i of [q.choice_dense, q.choice_target, q.gold]) row.append(make("td", named(i), { class: "text" }));
        for (const v of [q.margin_dense, q.margin_target]) row.append(make("td", digits(v), { class: "n", "data-v": v }));
        const box = make("details");
        box.append(make("summary", "question"), make("div", q.text, { class: "text" }));
        const last = make("td", undefined, { "data-v": q.text });
        last.append(box);
        row.append(last);
        return row;
      }));
      $("[data-flips-note]", part).textContent = `${run().view.flip_count} of ${run().view.question_count} questions get another choice` + (run().view.flips.length < run().view.flip_count ? `; the first ${run().view.flips.length} are listed.` : ".");
    };
    add("tops", async (figure, chart) => {
      const q = run().view.tops[pick.question.value], tall = narrow();
      $("[data-question-text]", part).textContent = q.text;
      const bars = (side, colour, i) => ({ type: "bar", name: side, legendgroup: side, marker: { color: colour }, x: q.tokens.map((_, n) => n), y: q.tokens.map((row) => row[i]), customdata: q.tokens.map((row) => label(row[0], 40)), hovertemplate: "%{customdata}: %{y:.6g}" });
      const [d, t] = [shares(q.loglik_dense), shares(q.loglik_target)];
      const letters = q.letters.map((x, i) => plain(x) + (i === q.gold ? "<br>(right)" : ""));
      const some = (side, colour, y) => ({ type: "bar", name: side, legendgroup: side, showlegend: false, marker: { color: colour }, x: letters.map((_, i) => i), y, xaxis: "x2", yaxis: "y2", hovertemplate: "%{y:.6g}" });
      await plot(figure, [bars("dense", DENSE, 1), bars("target", TARGET, 2), some("dense", DENSE, d), some("target", TARGET, t)], {
        bargap: 0.2, xaxis: { domain: tall ? [0, 1] : [0, 0.66], tickvals: q.tokens.map((_, n) => n), ticktext: q.tokens.map((row) => label(row[0], 10)), tickangle: -60, tickfont: { size: 10, family: "monospace" } },
        yaxis: { type: "log", title: "probability", domain: tall ? [0.62, 1] : [0, 1] }, xaxis2: { domain: tall ? [0, 1] : [0.74, 1], tickvals: letters.map((_, i) => i), ticktext: letters, anchor: "y2" }, yaxis2: { range: [0, 1], domain: tall ? [0, 0.32] : [0, 1], anchor: "x2", title: "among the options" },
        legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
      }, tall ? 620 : 400);
      say(figure, `Question ${q.id} (Fig. 8): the dense model's ${q.tokens.length} most likely tokens under both models, and the options among themselves. KL over the vocabulary ${digits(q.kl)} nats.`);
      chart.rows = [["token", "p_dense", "p_target"], ...q.tokens, ...q.letters.map((x, i) => [`option ${x}`, d[i], t[i]])];
    });
    add("margins", async (figure, chart) => {
      const p = run().view.points, fates = [["right in both", "#009E73", "circle"], ["right to wrong", "#D55E00", "triangle-down"], ["wrong to right", "#0072B2", "triangle-up"], ["wrong in both", "#888888", "x"]];
      const fate = p.gold.map((gold, i) => (p.choice_dense[i] === gold ? 0 : 2) + (p.choice_target[i] === gold ? 0 : 1));
      chart.rows = [["question", "margin_dense", "margin_target", "fate"], ...p.id.map((id, i) => [id, p.margin_dense[i], p.margin_target[i], fates[fate[i]][0]])];
      const reach = 1.05 * [...p.margin_dense, ...p.margin_target].reduce((m, v) => Math.max(m, Math.abs(v)), 1e-3);
      const traces = fates.map(([name, colour, symbol], f) => {
        const mine = fate.map((v, i) => (v === f ? i : -1)).filter((i) => i >= 0), take = (key) => mine.map((i) => p[key][i]);
        return { x: take("margin_dense"), y: take("margin_target"), text: take("id").map((id) => label(id, 40)), mode: "markers", marker: { color: colour, symbol, size: 7 }, name: `${name}: ${mine.length}`, hovertemplate: "%{text}<br>dense %{x:.6g}, target %{y:.6g}<extra></extra>" };
      });
      traces.push({ x: [-reach, reach], y: [-reach, reach], mode: "lines", line: { dash: "dot", width: 1, color: look().soft }, hoverinfo: "skip", showlegend: false });
      await plot(figure, traces, { xaxis: { title: "margin, dense (nats)", range: [-reach, reach] }, yaxis: { title: "margin, target (nats)", range: [-reach, reach] } }, 420);
      say(figure, `Margin of the right option over the best other one, before and after${run().view.stride > 1 ? `; every ${run().view.stride}. question is drawn` : ""}.`);
    });
    add("spaces", async (figure, chart) => {
      const name = pick.metric.value, traces = [];
      chart.rows = [["run", "question", "vocabulary", "options"]];
      let all = [];
      for (const [i, one] of runs.entries()) {
        const [whole, some] = [await unpack(one.view.global[name]), await unpack(one.view.options[name])];
        one.view.points.id.forEach((id, n) => chart.rows.push([one.name, id, whole[n], some[n]]));
        all = all.concat(whole.map(gap), some.map(gap));
        traces.push({ type: "box", name: plain(one.name), legendgroup: one.name, marker: { color: COLOURS[i % COLOURS.length], size: 3 }, boxpoints: "outliers", x: [...whole.map(() => "whole vocabulary"), ...some.map(() => "options")], y: [...whole.map(gap), ...some.map(gap)] });
      }
      const log = allPositive(all) && !/agree|overlap|_cos$|tv|centred/.test(name);
      if (log) for (const trace of traces) trace.y = positive(trace.y);
      await plot(figure, traces, { boxmode: "group", showlegend: true, yaxis: { title: name, type: log ? "log" : "linear" }, xaxis: {} }, 420);
      say(figure, `${name} of every question, over the whole vocabulary and over the options alone.`);
    });
    options();
    pick.run.addEventListener("change", () => { options(); redraw("tops", "margins"); });
    pick.question.addEventListener("change", () => redraw("tops"));
    pick.metric.addEventListener("change", () => redraw("spaces"));
  };

  // --- targets and checkpoints -----------------------------------------------------------------------------------------

  const sortable = (table) => {
    for (const [number, head] of $$("thead th", table).entries()) {
      const button = make("button", head.textContent, { type: "button" });
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const up = head.getAttribute("aria-sort") !== "ascending";
        for (const other of $$("thead th", table)) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const key = (row) => row.children[number].dataset.v ?? row.children[number].textContent;
        const rows = $$("tbody tr", table);
        rows.sort((a, b) => {
          const [x, y] = [key(a), key(b)];
          if (x === "" || y === "") return (x === "") - (y === ""); // what is not known stays below
          const order = Number.isNaN(Number(x)) || Number.isNaN(Number(y)) ? x.localeCompare(y) : Number(x) - Number(y);
          return up ? order : -order;
        });
        $("tbody", table).append(...rows);
      });
    }
  };
  const targets = () => {
    const table = $("table[data-targets]");
    if (!table) return;
    const names = [...new Set(data.targets.flatMap((t) => Object.keys(t.values)))];
    const columns = [["parameters", (t) => t.size.parameters], ["saved, %", (t) => t.size.saved], ["bytes as loaded", (t) => t.size.bytes], ["not zero", (t) => t.size.nonzero], ...names.map((name) => [name, (t) => t.values[name] ?? null])];
    const head = make("tr");
    head.append(make("th", "target", { scope: "col" }), ...columns.map(([name]) => make("th", name, { class: "n", scope: "col" })));
    $("thead", table).append(head);
    for (const t of data.targets) {
      const row = make("tr");
      row.append(make("th", t.name, { scope: "row", class: "text" }));
      for (const [, value] of columns) { const v = value(t); row.append(make("td", Number.isInteger(v) ? v.toLocaleString("en") : digits(v), { class: "n", "data-v": v ?? "" })); }
      $("tbody", table).append(row);
    }
    sortable(table);
    const pick = { x: $("[data-x]"), y: $("[data-y]") };
    fill(pick.y, names.map((name) => [name, name]), names.find((name) => name.startsWith("kl_dense_target")) || names[0]);
    add("pareto", async (figure, chart) => {
      const [x, y] = [pick.x.value, pick.y.value], known = data.targets.filter((t) => typeof t.values[y] === "number");
      const log = known.length > 0 && known.every((t) => t.values[y] > 0) && /KL|kl/.test(y);
      const dense = data.targets[0].size[x === "nonzero" ? "parameters_dense" : `${x}_dense`];
      chart.rows = [["target", x, y], ...known.map((t) => [t.name, t.size[x], t.values[y]])];
      await plot(figure, known.map((t, i) => ({ x: [t.size[x]], y: [t.values[y]], mode: "markers+text", text: [label(t.name, 30)], textposition: "top center", cliponaxis: false, marker: { size: 11, color: COLOURS[i % COLOURS.length] }, name: plain(t.name), showlegend: false, hovertemplate: "%{text}<br>%{x:,} / %{y:.6g}<extra></extra>" })), {
        shapes: [{ type: "line", x0: dense, x1: dense, y0: 0, y1: 1, yref: "paper", line: { dash: "dot", width: 1, color: look().soft } }],
        annotations: [{ text: "dense", x: dense, y: 1, yref: "paper", yanchor: "bottom", showarrow: false, font: { size: 11 } }],
        xaxis: { title: $(`option[value="${x}"]`, pick.x).textContent, rangemode: "normal", exponentformat: "SI" }, yaxis: { title: y, type: log ? "log" : "linear" }, margin: { l: 70, r: 60, t: 30, b: 50 },
      }, 380);
      say(figure, `${y} of every target against ${$(`option[value="${x}"]`, pick.x).textContent}; the dense model (dotted) has ${dense.toLocaleString("en")}.`);
    });
    for (const input of Object.values(pick)) input.addEventListener("change", () => redraw("pareto"));
  };
  const checkpoints = () => {
    for (const figure of $$('[data-chart="checkpoint"]')) {
      const one = data.checkpoints[figure.dataset.number];
      add("checkpoint", async (_, chart) => {
        if (one.view.errors) {
          const { names, layers, values } = one.view.errors;
          if (!layers.length) return say(figure, "No reconstruction errors were measured.");
          chart.rows = [["matrix", "block", "relative error"], ...names.flatMap((name, n) => layers.map((layer, i) => [name, layer, values[n][i]]))];
          await plot(figure, [{ type: "heatmap", x: layers, y: names.map(plain), z: values, colorscale: "Viridis", colorbar: { thickness: 12, outlinewidth: 0 }, hovertemplate: "block %{x}, %{y}: %{z:.6g}<extra></extra>" }], { xaxis: { title: "block" }, yaxis: {} }, 320);
          return say(figure, "Relative error |(W − W′)X| / |WX| of every kind of matrix by block.");
        }
        if (one.view.healing) {
          const checks = one.view.healing, x = checks.map((row) => row.tokens);
          chart.rows = [["tokens", "loss", "held-out KL"], ...checks.map((row) => [row.tokens, row.loss, row.held_out_kl])];
          const curve = (name, key, colour, dash) => ({ x, y: checks.map((row) => row[key]), name, mode: "lines+markers", line: { color: colour, dash }, hovertemplate: "%{x} tokens: %{y:.6g}" });
          await plot(figure, [curve("held-out texts", "held_out_kl", COLOURS[0], "solid"), curve("loss of the step", "loss", COLOURS[2], "dot")], { showlegend: true, xaxis: { title: "tokens trained on", rangemode: "tozero" }, yaxis: { title: "KL, nats a token", type: "log" } }, 300);
          return say(figure, "KL(dense ‖ healed) at every check, in nats a token.");
        }
        const rows = one.view.scores, kinds = [...new Set(rows.map((row) => row.sublayer))];
        chart.rows = [["layer", "sublayer", "score", "dropped"], ...rows.map((row) => [row.layer, row.sublayer, row.score, row.dropped])];
        const traces = kinds.flatMap((kind, k) => [false, true].map((gone) => {
          const mine = rows.filter((row) => row.sublayer === kind && row.dropped === gone);
          return { x: mine.map((row) => row.layer), y: mine.map((row) => row.score), mode: "markers", marker: { size: 8, symbol: gone ? "x" : ["circle", "square", "diamond"][k % 3], color: gone ? TARGET : COLOURS[k === 1 ? 2 : 0] }, name: `${kind}, ${gone ? "dropped" : "kept"}`, hovertemplate: "layer %{x}: %{y:.6f}" };
        })).filter((trace) => trace.x.length);
        await plot(figure, traces, { showlegend: true, xaxis: { title: "layer" }, yaxis: { title: "score" } }, 300);
        say(figure, rows.length ? "Score by layer: mean cosine of the stream before and after; the highest are needed least." : "This checkpoint holds no scores.");
      }, figure);
    }
  };

  // --- the page --------------------------------------------------------------------------------------------------------

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
    for (const build of [layers, decoding, choices, targets, checkpoints]) { build(); await tick(); }
    work();
  })();
})();
