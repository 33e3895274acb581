// Tokens by KL, with a search and filters; of `generate` and `divergence` runs alike. Returns what fills the list anew.
// `show` goes to a token in the two texts, where `has` says that the page holds it.
const worst = (box, tokens, show, has = () => false) => {
  const PAGE = 40;
  const pick = Object.fromEntries(["search", "confidence", "kind", "only"].map((name) => [name, $(`[data-${name}]`, box)]));
  const list = $("[data-list]", box), readout = $("[data-readout]", box), more = $("[data-more-tokens]", box);
  let found = [], chosen = -1, shown = PAGE;
  const texts = (token) => [token.text, token.before, token.where, ...token.dense.map(([text]) => text), ...token.target.map(([text]) => text)];
  const choose = (number, scroll) => {
    const items = list.children;
    if (items[chosen]) items[chosen].setAttribute("aria-selected", "false");
    chosen = number;
    readout.replaceChildren();
    if (!items[number]) return readout.append("Point at a token, or use the arrow keys, to see the most likely tokens of both models.");
    items[number].setAttribute("aria-selected", "true");
    list.setAttribute("aria-activedescendant", items[number].id);
    if (scroll) items[number].scrollIntoView({ block: "nearest" });
    const token = found[number], head = make("div");
    head.append(make("code", visible(token.text.replace(/ /g, "\u2423")), { class: "text" }), make("span", ` (${token.where}): KL = `), make("b", digits(token.kl), { "data-v": token.kl }),
      make("span", ` nats, \u0394p ${(100 * token.dp).toFixed(1)} %, ${token.same ? "same" : "another"} most likely token${token.fork ? "; the texts part here" : ""}.`));
    if (token.q !== undefined) head.append(make("span", ` Rank ${token.place === null ? "unknown, below the five that are kept," : token.place.toLocaleString("en")} in the target, p = ${token.q.toPrecision(3)}: 10 draws contain it with probability ${atLeastOnce(token.q, 10).toFixed(3)}, 100 with ${atLeastOnce(token.q, 100).toFixed(3)}.`));
    readout.append(head, mostLikely(token, token.text));
    if (has(token)) {
      const button = make("button", "Show in the two texts", { type: "button" });
      button.addEventListener("click", () => show(token));
      readout.append(button);
    }
  };
  const write = () => {
    const asked = pick.search.value.toLowerCase(), [low, high] = pick.confidence.value ? pick.confidence.value.split(" ").map(Number) : [-1, 2];
    const all = tokens();
    found = all.filter((token) => token.confidence >= low && token.confidence < high && (!pick.kind.value || token.kind === pick.kind.value)
      && (pick.only.value === "fork" ? token.fork : pick.only.value === "other" ? !token.same : true)
      && (!asked || texts(token).some((text) => text.toLowerCase().includes(asked))));
    const largest = all.reduce((m, token) => Math.max(m, token.kl), 1e-12);
    list.replaceChildren(...found.slice(0, shown).map((token, i) => {
      const item = make("li", undefined, { role: "option", id: `${box.dataset.worst}-${i}`, "aria-selected": "false" });
      const text = make("span", undefined, { class: "near" }), mark = make("mark", visible(token.text.replace(/ /g, "\u2423")));
      mark.style.background = `rgba(var(--mark), ${(0.5 * Math.sqrt(Math.max(0, token.kl) / largest)).toFixed(3)})`;
      text.append(make("span", token.before.replace(/\s+/g, " "), { class: "soft" }), mark);
      if (token.fork) text.append(" ", make("span", "fork", { class: "badge" }));
      item.append(make("span", token.kl.toFixed(3), { class: "kl" }), text, make("span", `${token.where}, p ${token.confidence.toFixed(2)}`, { class: "soft at" }));
      return item;
    }));
    list.hidden = !found.length;
    more.hidden = found.length <= shown;
    $("[data-count]", box).textContent = `${found.length.toLocaleString("en")} of ${all.length.toLocaleString("en")} tokens. Each row: KL, the token after the text before it, where it is, and p of the dense model's most likely token.`;
    choose(-1);
  };
  const options = () => {
    fill(pick.kind, [["", "all"], ...[...new Set(tokens().map((token) => token.kind))].map((kind) => [kind, label(kind, 40)])], pick.kind.value);
    shown = PAGE;
    write();
  };
  walked(list, () => chosen, choose);
  more.addEventListener("click", () => { shown += PAGE; write(); });
  for (const name of ["confidence", "kind", "only"]) pick[name].addEventListener("change", () => { shown = PAGE; write(); });
  pick.search.addEventListener("input", () => { shown = PAGE; write(); });
  options();
  return options;
};
const passages = () => {
  for (const [i, tokens] of data.read.entries()) worst($(`[data-worst="read-${i}"]`), () => tokens);
};
