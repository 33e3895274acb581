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
    const kept = view.stride > 1 && !grid.tokens ? `; one step in ${view.stride} is kept` : "";
    const some = view.prompts.length < view.prompt_count ? `; ${view.prompts.length} of ${view.prompt_count} prompts are kept one by one` : "";
    say(figure, `${name} by layer and decoding step, ${grid.tokens ? `prompt ${view.prompts[pick.prompt.value].id}` : `mean over ${view.prompt_count} prompts`}; lens ${run().lens}, T = ${run().temperature}${kept}${some}. ${log ? "The lowest 1 % of the cells share the darkest colour. " : ""}Blank: missing${log ? ", or exactly zero" : ""}.`);
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
