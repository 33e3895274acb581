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
    if (!items[step]) return readout.append("Point at a step, or use the arrow keys, to see the most likely tokens of both models.");
    items[step].setAttribute("aria-selected", "true");
    list.setAttribute("aria-activedescendant", items[step].id);
    if (scroll) items[step].scrollIntoView({ block: "nearest" });
    const row = rows()[step];
    const head = make("div", `Step ${step}: `);
    readout.append(head);
    if (!row) return head.append("one of the texts has ended; there is nothing to compare.");
    head.append(make("span", "KL = "), make("b", digits(row.kl), { "data-v": row.kl }), make("span", ` nats, ${row.same ? "same" : "another"} most likely token`));
    if (!row.dense) return head.append("; this run was made before most likely tokens were kept");
    readout.append(mostLikely(row));
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
    if (t === one.first) { item.classList.add("fork"); item.title = "the texts part here"; }
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
  walked(list, () => chosen, choose);
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
  const box = $("[data-worst]", part);
  const first = box && worst(box, () => run().worst, (token) => {
    pick.prompt.value = String(token.prompt);
    pick.regime.value = "forced";
    shown = Math.max(PAGE, token.step + 1);
    write();
    choose(token.step, true);
    list.focus();
  }, (token) => run().view.texts[token.prompt] !== undefined && token.step < run().view.texts[token.prompt].dense.length);
  pick.run.addEventListener("change", () => {
    options();
    shown = PAGE;
    write();
    redraw("history");
    if (first) first();
    for (const one of $$("[data-passages]", part)) one.hidden = one.dataset.passages !== pick.run.value;
  });
  for (const name of ["prompt", "colour", "regime"]) pick[name].addEventListener("change", () => { shown = PAGE; write(); });
  pick.metric.addEventListener("change", () => redraw("steps"));
};
