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
    $("[data-flips-list]", part).hidden = !run().view.flips.length;
    const body = $("[data-flips] tbody", part);
    body.replaceChildren(...run().view.flips.map((q) => {
      const row = make("tr");
      const named = (i) => `${q.letters[i] ?? i}: ${q.choices[i] ?? ""}`;
      row.append(make("th", q.id, { scope: "row", class: "text" }));
      for (const i of [q.choice_dense, q.choice_target, q.gold]) row.append(make("td", named(i), { class: "text" }));
      for (const v of [q.margin_dense, q.margin_target]) row.append(make("td", digits(v), { class: "n", "data-v": v }));
      const known = q.q !== undefined, chance = known ? atLeastOnce(q.q, 100) : "";
      row.append(make("td", known ? q.place.toLocaleString("en") : "\u2013", { class: "n", "data-v": known ? q.place : "" }), make("td", known ? chance.toFixed(3) : "\u2013", { class: "n", "data-v": chance }));
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
    say(figure, `Margin of the right option over the best other one, before and after${run().view.stride > 1 ? `; one question in ${run().view.stride} is drawn` : ""}.`);
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
