// The address holds what is chosen: #view=decoding&target=NAME&prompt=1 shows that part of the page with these menus set.
const links = () => {
  const KEYS = ["run", "metric", "prompt", "scale", "pair", "kind", "colour", "regime", "question", "x", "y", "search", "confidence", "only", "series", "point", "cell"];
  // A menu's name in the address; of several alike in one part, such as two sweeps, the later ones are numbered.
  const named = (section) => {
    const found = new Map();
    for (const input of $$("select, input", section)) {
      const key = KEYS.find((name) => name in input.dataset);
      if (!key) continue;
      const name = key === "run" ? "target" : key === "cell" ? `cell-${input.dataset.cell}` : key;
      let free = name;
      for (let i = 2; found.has(free); i++) free = `${name}-${i}`;
      found.set(free, input);
    }
    return found;
  };
  // Runs are called by their names, which hold in another page of the same runs too.
  const said = (input) => (input.dataset.run !== undefined && input.selectedIndex >= 0 ? input.options[input.selectedIndex].textContent : input.value);
  const usual = new Map();
  for (const section of $$("main section")) for (const input of named(section).values()) usual.set(input, said(input));
  const set = (input, value) => {
    const option = input.dataset.run === undefined ? null : [...input.options].find((one) => one.textContent === value);
    const wanted = option ? option.value : value;
    if (input.tagName === "SELECT" && ![...input.options].some((one) => one.value === wanted)) return;
    if (input.value === wanted) return;
    input.value = wanted;
    for (const event of ["input", "change"]) input.dispatchEvent(new Event(event, { bubbles: true }));
  };
  let restoring = false;
  const restore = () => {
    const asked = new URLSearchParams(location.hash.slice(1)), section = document.getElementById(asked.get("view") || "");
    if (!section || section.tagName !== "SECTION") return;
    restoring = true;
    // in the order of the page: a menu may decide what the next ones offer
    for (const [name, input] of named(section)) if (asked.has(name)) set(input, asked.get(name));
    restoring = false;
    section.scrollIntoView();
  };
  const keep = (event) => {
    const section = event.target.closest("main section");
    if (restoring || !section || !usual.has(event.target)) return;
    const chosen = [...named(section)].filter(([, input]) => said(input) !== usual.get(input)).map(([name, input]) => [name, said(input)]);
    try { history.replaceState(null, "", `#${new URLSearchParams([["view", section.id], ...chosen])}`); } catch { /* a page in a sandboxed frame has no address of its own */ }
  };
  document.addEventListener("change", keep);
  document.addEventListener("input", keep);
  window.addEventListener("hashchange", restore);
  restore();
};
