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
