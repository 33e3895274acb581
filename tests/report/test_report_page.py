"""The page in a real browser, Chromium: what is drawn, what can be reached, what the numbers are, what hostile text does.

Screenshots are kept in ``test-output/report``.
"""

from __future__ import annotations

import csv
import io
import math
import os
import random
import shutil
from pathlib import Path

import pyarrow.compute as pc
import pytest

import prunescope
from prunescope.report.page import html
from prunescope.report.terminal.divergence import kl_lines
from reports import HOSTILE, checkpoint, divergence_run, generate_run, layerwise_run, mcq_run, sweep_run

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; make test installs it")

ROOT = Path(__file__).resolve().parents[2]
SHOTS = ROOT / "test-output" / "report"
AXE = ROOT / ".venv" / "axe" / "node_modules" / "axe-core" / "axe.min.js"
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
CHARTS = {"heat", "layers", "multiples", "steps", "survival", "history", "confidence", "tops", "margins", "spaces", "pareto", "checkpoint"}  # fmt: skip

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed; make test installs it"),
]


class Watched:
    """A page with everything it said on the console and asked of the network."""

    def __init__(self, page, path, address=""):
        self.page, self.troubles, self.requests = page, [], []
        page.on("console", lambda m: self.troubles.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: self.troubles.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))
        page.set_default_timeout(30_000)
        page.goto(path.as_uri() + address)
        page.wait_for_selector("html[data-ready]")

    def settled(self):
        """Until no chart waits to be drawn: the figures' counts stand still."""
        counts = "JSON.stringify([...document.querySelectorAll('figure')].map(f => f.dataset.drawn))"
        before = None
        while before != (before := self.page.evaluate(counts)):
            self.page.wait_for_timeout(250)

    def quiet(self):
        assert not self.troubles
        assert len(self.requests) == 1 and self.requests[0].startswith("file://")

    def download(self, selector):
        with self.page.expect_download() as found:
            self.page.click(selector)
        return Path(found.value.path()).read_text("utf-8-sig")


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        yield (one := playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]))
        one.close()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return [
        layerwise_run(root / "turn"),
        layerwise_run(root / "normed", lens="final-norm", seed=1),
        generate_run(root / "texts"),
        generate_run(root / "texts-thinner", target="thinner", seed=2),
        mcq_run(root / "options"),
        divergence_run(root / "read"),
        checkpoint(root / "dropped"),
        checkpoint(root / "sparse", "sparsify"),
        checkpoint(root / "thinner", "heal"),
        sweep_run(root / "swept"),
    ]


@pytest.fixture(scope="module")
def page_file(folders, tmp_path_factory):
    return html.write_report(
        [html.open_folder(folder) for folder in folders], tmp_path_factory.mktemp("page") / "p.html"
    )


@pytest.fixture
def page(browser, page_file):
    with browser.new_context(viewport={"width": 1280, "height": 900}) as context:
        watched = Watched(context.new_page(), page_file)
        watched.settled()
        yield watched
        watched.quiet()


def test_every_view_is_drawn(page):
    drawn = page.page.evaluate(
        """[...document.querySelectorAll('figure')].filter(f => f.querySelector('svg.main-svg') && f.querySelector('[data-caption]').textContent).map(f => f.dataset.chart)"""
    )
    assert set(drawn) == CHARTS and len(drawn) == len(CHARTS) + 2  # three checkpoints
    assert page.page.locator(".card").count() == 6
    assert page.page.locator("[data-flips] tbody tr").count() > 0


def test_size(page_file):
    """The library is 1.5 MB: catches it inlined twice, and rows of small runs that are kept more than once."""
    assert page_file.stat().st_size < 2.8e6


def test_no_table_where_no_answer_changed(browser, tmp_path):
    """An empty table under its heading says less than the sentence above it."""
    for seed in range(30):  # until the one question gets the same answer
        folder = mcq_run(tmp_path / str(seed), questions=1, seed=seed)
        run = html.open_folder(folder)
        row = run.table().to_pylist()[0]
        if row["choice_dense"] == row["choice_target"]:
            break
    with browser.new_context() as context:
        watched = Watched(context.new_page(), html.write_report([run], tmp_path / "p.html"))
        assert watched.page.inner_text("[data-flips-note]") == "0 of 1 questions get another choice."
        assert not watched.page.is_visible("[data-flips-list]")
        watched.quiet()


def test_a_divergence_run_is_shown(page, folders):
    """Against run.json and samples.jsonl. Catches a row of the table, a group or a passage that is left out, and tops of the other model."""
    p, run = page.page, prunescope.open(next(f for f in folders if f.name == "read"))
    table = dict(
        zip(
            *(p.locator(f"#divergence .kld {part}").all_text_contents() for part in ("th[scope=row]", "td")),
            strict=True,
        )
    )
    mean, error = run.info["table"]["kl_dense_target"]["mean"]
    assert table["Mean KLD"].split() == [f"{mean:.6f}", "±", f"{error:.6f}"]
    assert list(table) == [name for _, lines in kl_lines(run.info["table"]) for name, _ in lines]
    shown = p.text_content("#divergence")
    assert "between q8_0 and q2_k of this model's own quantised types" in shown
    for title in ("By text", "By the dense model's confidence", "By position in the chunk", "By chunk"):
        assert title in shown, title
    rungs = p.locator("[aria-label='Ladder of read'] tbody th").all_text_contents()
    assert rungs == ["q8_0", "thin", "q2_k"]  # the target among them, by KL
    worst = run.samples()
    assert p.locator("#divergence .passage").count() == len(worst) > 5
    first = p.locator("#divergence .passage").first
    cells = first.locator("tbody tr").first.locator("th, td").all_text_contents()
    token = worst[0]["tokens"][0]
    assert cells[0] == token["text"].replace(" ", "\u2423") and cells[1] == f"{token['kl_dense_target']:.3f}"
    for cell, side in zip(cells[3:], ("dense", "target"), strict=True):
        for top in token[f"top_{side}"]:
            assert f"{top['text'].replace(' ', chr(0x2423))} {top['p']:.3f}" in cell


def test_worst_tokens_first(page, folders):
    """Every token of the teacher-forced rows against the files. Catches another order, another regime, a filter of the other model, a search
    that leaves out what both find likely, a fork beside the first difference, tops of another token."""
    p, run = page.page, prunescope.open(next(f for f in folders if f.name == "texts"))
    samples = run.samples()
    rows = run.table().filter(pc.field("regime") == "teacher-forced").sort_by([("kl_dense_target", "descending")])
    rows = rows.to_pylist()
    box = p.locator("#decoding [data-worst=generate]")
    shown = lambda part="li .kl": box.locator(part).all_text_contents()  # noqa: E731
    assert shown() == [f"{row['kl_dense_target']:.3f}" for row in rows]
    marks = [samples[row["prompt"]]["dense_pieces"][row["step"]].replace(" ", "\u2423") for row in rows]
    assert shown("li mark") == marks
    box.locator("[data-list]").focus()
    for _ in range(3):
        p.keyboard.press("ArrowDown")
    assert float(box.locator("[data-readout] b").get_attribute("data-v")) == rows[2]["kl_dense_target"]
    found = [float(cell.get_attribute("data-v")) for cell in box.locator("[data-readout] td.n").all()]
    assert found == pytest.approx(rows[2]["top_dense_p"] + rows[2]["top_target_p"], rel=1e-5)
    chance = 1 - (1 - math.exp(-rows[2]["nll_target"])) ** 100
    assert f"100 with {chance:.3f}" in box.locator("[data-readout]").text_content()
    box.locator("[data-confidence]").select_option("0.5 0.9")
    assert len(shown()) == sum(0.5 <= row["top_dense_p"][0] < 0.9 for row in rows) > 0
    box.locator("[data-confidence]").select_option("")
    box.locator("[data-only]").select_option("fork")
    forks = [row for row in rows if run.info["first_difference"]["by_prompt"][row["prompt"]] == row["step"]]
    assert shown() == [f"{row['kl_dense_target']:.3f}" for row in forks]
    assert len(forks) == 2  # a text of the target ends a step before the dense one
    box.locator("li").first.click()
    box.locator("button >> text=Show in the two texts").click()
    assert p.text_content("[data-readout=step]").startswith(f"Step {forks[0]['step']}:")
    assert "fork" in p.locator("[data-tokens] li[aria-selected=true]").get_attribute("class")
    box.locator("[data-only]").select_option("")
    box.locator("[data-search]").fill("p2, STEP")
    assert len(shown()) == sum(row["prompt"] == 2 for row in rows)
    box.locator("[data-search]").fill("nothing of this")
    assert shown() == [] and box.locator("[data-list]").is_hidden()
    passages = p.locator("#decoding [data-passages='0'] .passage").all_text_contents()
    means = {(r["prompt"], r["step"]): r["kl_dense_target"] for r in rows}
    best = max(
        sum(means[n, t] for t in range(6)) / 6 for n in range(3)
    )  # the texts have six steps, fewer than a passage
    assert passages[0].startswith(f"KL {best:.3f}") and len(passages) == 3


def test_slider_of_a_sweep(page):
    """Catches a point of another series, one use's share for the other's, and a slider that the keyboard cannot move."""
    p = page.page
    p.select_option("#sweeps [data-series]", "1")
    p.focus("#sweeps [data-point]")
    p.keyboard.press("ArrowRight")
    p.keyboard.press("ArrowRight")
    assert p.get_attribute("#sweeps [data-point]", "aria-valuetext").startswith("mlp-003: 3.0 % of the weights removed")
    kept = [float(one.get_attribute("data-kept")) for one in p.locator("#sweeps [data-kept]").all()]
    assert kept == pytest.approx(
        [0.7, 1 - 0.1 / 0.75]
    )  # 1.5 of ten options wrong rounds down to one item, of the 0.75 above chance
    assert p.locator("#sweeps tr.own th").all_text_contents() == ["mlp-003"]


def test_dense_pruned_and_healed_in_one_row(page, folders):
    """Catches pruned and healed the wrong way round, and a dense model that is not at its own place."""
    p = page.page
    rows = [row.locator("th, td").all_text_contents() for row in p.locator("#healing tbody tr").all()]
    found = {row[0]: row[1:] for row in rows}
    assert found["KL on the held-out text, nats a token"] == ["0", "0.9", "0.3"]
    means = [
        prunescope.open(next(f for f in folders if f.name == name)).info["summary_by_regime"]["teacher-forced"]["h"]["h_cos"]["mean"]
        for name in ("texts", "texts-thinner")
    ]  # fmt: skip
    assert found["h_cos, teacher-forced"] == ["1", *(f"{mean:.4g}" for mean in means)]


def test_address_holds_the_view(browser, page, page_file):
    """What is chosen stands in the address, and the address chooses it again. Catches a run by its number, and menus set before those they
    depend on."""
    p = page.page
    p.select_option("#decoding [data-run]", "1")
    p.select_option("#decoding [data-prompt]", "2")
    p.select_option("#decoding [data-only]", "fork")
    address = p.evaluate("location.hash")
    assert address == "#view=decoding&target=thinner&prompt=2&only=fork"
    with browser.new_context(viewport={"width": 1280, "height": 900}) as context:
        again = Watched(context.new_page(), page_file, address)
        chosen = [
            again.page.evaluate(f"document.querySelector('#decoding [data-{n}]').value")
            for n in ("run", "prompt", "only")
        ]
        assert chosen == ["1", "2", "fork"]
        assert abs(again.page.evaluate("document.querySelector('#decoding').getBoundingClientRect().top")) < 120
        again.page.evaluate("location.hash = '#view=sweeps&series=1&point=1'")
        again.page.wait_for_function("document.querySelector('#sweeps [data-point]').value === '1'")
        assert again.page.text_content("#sweeps [data-at]").startswith("mlp-001")
        again.page.evaluate("location.hash = '#view=nothing&target=<b>'")
        again.quiet()


def test_erased_or_demoted(page, folders):
    """Catches the dense model's place, and a chance that is not of the right option."""
    p, run = page.page, prunescope.open(next(f for f in folders if f.name == "options"))
    rows = run.table().filter(pc.field("space") == "global").to_pylist()
    flips = [row for row in rows if row["choice_dense"] != row["choice_target"]]
    cells = p.locator("[data-flips] tbody tr").first.locator("th, td").all_text_contents()
    chance = 1 - (1 - math.exp(flips[0]["loglik_target"][flips[0]["gold"]])) ** 100
    assert cells[6:8] == [str(flips[0]["gold_rank_target"] + 1), f"{chance:.3f}"]
    table = p.locator("#options [aria-label^='Erased or demoted'] tbody tr").all_text_contents()
    assert len(table) == 3 and f"target{run.info['right_token']['target']['count']}" in table[1]


def test_numbers_are_those_of_the_files(page, folders):
    """Read back from the page as a person would: the cell's read-out, the hovered step, tables, downloads."""
    layerwise, texts, options = (prunescope.open(folders[i]).table() for i in (0, 2, 4))
    p, random_ = page.page, random.Random(0)
    for name, prompt in (("kl_dense_target", "mean"), ("z_alpha", "mean"), ("p_cos_dev", "1"), ("dp_top1", "2")):
        p.select_option("#layers [data-metric]", name)
        p.select_option("#layers [data-prompt]", prompt)
        page.settled()
        for _ in range(4):
            kind, layer, step = random_.randrange(2), random_.randrange(4), random_.randrange(5)
            p.select_option("[data-cell=kind]", str(kind))
            p.fill("[data-cell=layer]", str(layer))
            p.fill("[data-cell=step]", str(step))
            chosen = (
                (pc.field("layer") == layer)
                & (pc.field("step") == step)
                & (pc.field("sublayer") == ("attn", "mlp")[kind])
            )
            rows = layerwise.filter(chosen if prompt == "mean" else chosen & (pc.field("prompt") == int(prompt)))
            expected = pc.mean(rows[name]).as_py()
            shown = p.locator("[data-readout=heat] b")
            assert float(shown.get_attribute("data-v")) == pytest.approx(expected, rel=1e-6)
            assert float(shown.text_content()) == pytest.approx(expected, rel=1e-5)
            if prompt != "mean":
                assert f" word{step}" in p.text_content("[data-readout=heat]")
    p.select_option("#layers [data-metric]", "tv")
    page.settled()
    rows = list(csv.DictReader(io.StringIO(page.download("[data-chart=layers] [data-save=csv]"))))
    assert len(rows) == 2 * 2 * 4
    for row in rows[:8]:
        mine = layerwise.filter(
            (pc.field("layer") == int(row["layer"]))
            & (pc.field("sublayer") == {"attention": "attn", "MLP": "mlp"}[row["sublayer"]])
        )
        assert float(row["mean"]) == pytest.approx(pc.mean(mine["tv"]).as_py(), rel=1e-14)
    p.select_option("#decoding [data-prompt]", "2")
    p.hover("#decoding [data-tokens] li >> nth=3")
    mine = texts.filter(
        (pc.field("prompt") == 2) & (pc.field("step") == 3) & (pc.field("regime") == "free-running")
    ).to_pylist()[0]
    assert float(p.get_attribute("[data-readout=step] b", "data-v")) == mine["kl_dense_target"]
    shown = [float(cell.get_attribute("data-v")) for cell in p.locator("[data-readout=step] td.n").all()]
    assert shown == pytest.approx(mine["top_dense_p"] + mine["top_target_p"], rel=1e-5)
    info = prunescope.open(folders[2]).info
    cells = p.locator("[data-targets] tbody tr >> nth=0").locator("td").all()
    values = {
        head: cell.get_attribute("data-v")
        for head, cell in zip(p.locator("[data-targets] th button").all_text_contents()[1:], cells, strict=True)
    }
    forced = info["summary_by_regime"]["teacher-forced"]
    assert float(values["kl_dense_target, teacher-forced"]) == forced["p"]["kl_dense_target"]["mean"]
    assert float(values["h_cos, teacher-forced"]) == forced["h"]["h_cos"]["mean"]
    assert float(values["parameters"]) == info["models"]["target"]["parameters"]
    whole = options.filter(pc.field("space") == "global").to_pylist()
    flips = [row for row in whole if row["choice_dense"] != row["choice_target"]]
    found = [float(cell.get_attribute("data-v")) for cell in p.locator("[data-flips] td.n").all()]
    assert found[0::4] == [row["margin_dense"] for row in flips] and found[1::4] == [
        row["margin_target"] for row in flips
    ]


def test_menus_sorting_hover_and_downloads(page):
    p = page.page
    p.select_option("#layers [data-metric]", "h_orth_rel")
    p.select_option("#layers [data-run]", "1")
    page.settled()
    assert "h_orth_rel" in p.text_content("[data-chart=heat] [data-caption]") and "final-norm" in p.text_content(
        "[data-chart=heat] [data-caption]"
    )
    p.locator("[data-chart=heat]").scroll_into_view_if_needed()
    box = p.locator("[data-chart=heat] .nsewdrag").first.bounding_box()
    p.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.4)
    p.wait_for_selector("[data-chart=heat] .hoverlayer .hovertext")
    assert "h_orth_rel" in p.locator("[data-chart=heat] .hoverlayer").text_content()
    svg = page.download("[data-chart=heat] [data-save=svg]")
    assert svg.startswith("<svg") and "attention" in svg
    first = "[data-targets] tbody tr >> nth=0 >> th"
    p.click("[data-targets] th button >> text=parameters")
    assert (
        p.get_attribute("[data-targets] th >> nth=1", "aria-sort") == "ascending" and p.text_content(first) == "thinner"
    )
    p.click("[data-targets] th button >> text=parameters")
    assert p.text_content(first) == "thin"
    p.select_option("[data-y]", "accuracy")
    page.settled()
    assert p.text_content("[data-chart=pareto] [data-caption]").startswith("accuracy")
    assert "h_cos_dev_est" in page.download("[data-save-table=glossary]")
    for pair in ("kl_dense_target", "h_cos_dev"):
        p.select_option("[data-pair]", pair)
        page.settled()
        assert pair in p.text_content("[data-chart=multiples] [data-caption]")


def test_keyboard_reaches_everything(page):
    """Tab passes every control once, in order; arrows walk through the steps."""
    p = page.page
    names = "a[href], button:not([hidden]), select, input, summary, [tabindex='0']"
    count = p.evaluate(f'[...document.querySelectorAll("{names}")].filter(e => e.checkVisibility()).length')
    seen = []
    for _ in range(count):
        p.keyboard.press("Tab")
        seen.append(p.evaluate("(() => { const e = document.activeElement; e.dataset.seen = 1; return e.tagName })()"))
    assert p.evaluate("document.querySelectorAll('[data-seen]').length") == count and "SELECT" in seen
    p.focus("[data-tokens]")
    p.keyboard.press("ArrowRight")
    p.keyboard.press("ArrowRight")
    assert p.text_content("[data-readout=step]").startswith("Step 1:")
    p.keyboard.press("End")
    assert p.get_attribute("[data-tokens] li >> nth=-1", "aria-selected") == "true"
    p.focus("#theme")
    p.keyboard.press("Enter")
    p.keyboard.press("Enter")
    assert p.get_attribute("html", "data-theme") == "dark"
    page.settled()


@pytest.mark.parametrize(
    ("width", "scheme"), [(390, "light"), (390, "dark"), (768, "light"), (1280, "dark"), (1920, "light")]
)
def test_widths_and_colours(browser, page_file, width, scheme):
    """No sideways scrolling, no serious finding of axe-core; the picture is kept."""
    with browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, bypass_csp=True) as context:
        page = Watched(context.new_page(), page_file)
        page.settled()
        assert page.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        SHOTS.mkdir(parents=True, exist_ok=True)
        page.page.screenshot(path=SHOTS / f"page-{width}-{scheme}.png", full_page=True)
        page.quiet()
        if not AXE.is_file():
            pytest.skip("axe-core is not installed; make test installs it")
        page.page.evaluate(AXE.read_text("utf-8"))
        found = page.page.evaluate("axe.run({resultTypes: ['violations']})")
        bad = [
            (v["id"], [n["target"] for n in v["nodes"]][:3])
            for v in found["violations"]
            if v["impact"] in ("serious", "critical")
        ]
        assert not bad


def test_print(browser, page_file):
    """In print the menus go, the numbers stay, and nothing is dark."""
    with browser.new_context(color_scheme="dark") as context:
        page = Watched(context.new_page(), page_file)
        page.settled()
        page.page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
        page.page.emulate_media(media="print")
        widths = page.page.evaluate(
            "[...document.querySelectorAll('.main-svg')].map(e => e.getBoundingClientRect().width)"
        )
        assert widths and max(widths) <= 680  # a sheet of A4 has 717 px between its margins
        assert (
            page.page.evaluate("document.querySelector('[data-chart=steps] .chart').layout.xaxis.gridcolor")
            == "#e3e5e9"
        )
        assert not page.page.is_visible("nav") and not page.page.is_visible("[data-save=csv]")
        assert page.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        SHOTS.mkdir(parents=True, exist_ok=True)
        page.page.pdf(path=SHOTS / "print.pdf", format="A4", print_background=True)
        assert (SHOTS / "print.pdf").stat().st_size > 20_000
        page.page.emulate_media(media="screen")
        page.page.evaluate("window.dispatchEvent(new Event('afterprint'))")
        assert (
            page.page.evaluate("document.querySelector('[data-chart=heat] .main-svg').getBoundingClientRect().width")
            > 800
        )
        page.quiet()


def test_hostile_text_is_text(browser, tmp_path):
    """Scripts, tags, quotes, direction marks, half surrogates and huge tokens show as they are and run nothing."""
    folders = [
        layerwise_run(tmp_path / "l", target=HOSTILE[0], texts=HOSTILE, steps=8),
        generate_run(tmp_path / "g", target=HOSTILE[1], texts=HOSTILE, prompts=8),
        mcq_run(tmp_path / "m", target=HOSTILE[6], texts=HOSTILE),
        divergence_run(tmp_path / "d", target=HOSTILE[2], texts=HOSTILE),
    ]
    file = html.write_report([prunescope.open(folder) for folder in folders], tmp_path / "page.html")
    with browser.new_context(viewport={"width": 390, "height": 900}) as context:
        page = Watched(context.new_page(), file)
        p = page.page
        for number in range(8):
            p.select_option("#decoding [data-prompt]", str(number))
            shown = p.text_content("[data-prompt-text]")
            assert shown.startswith(HOSTILE[number][:400])
        p.select_option("#layers [data-prompt]", "0")
        for step in range(8):
            p.fill("[data-cell=step]", str(step))
            p.hover(f"[data-tokens] li >> nth={min(step, 4)}")
        page.settled()
        for chart in ("heat", "tops"):
            p.locator(f"[data-chart={chart}]").scroll_into_view_if_needed()
            box = p.locator(f"[data-chart={chart}] .nsewdrag").first.bounding_box()
            for share in (0.1, 0.5, 0.9):
                p.mouse.move(box["x"] + box["width"] * share, box["y"] + box["height"] * 0.9)
                p.wait_for_timeout(60)
        p.evaluate("document.querySelectorAll('#divergence details').forEach(d => d.open = true)")
        spelled = set(p.locator("#divergence .tops th.text").all_text_contents())
        assert {HOSTILE[0].replace(" ", "\u2423"), HOSTILE[1].replace(" ", "\u2423")} <= spelled
        p.evaluate("document.querySelectorAll('#divergence details').forEach(d => d.open = false)")
        assert p.evaluate("window.hurt") is None
        assert (
            p.evaluate(
                """document.querySelectorAll('main img:not([src^="data:image/svg+xml;base64,"]), main script, main b[onmouseover], main a[href^=javascript]').length"""
            )
            == 0
        )
        assert p.evaluate("document.querySelectorAll('svg a').length") == 0
        assert p.evaluate("document.documentElement.scrollWidth <= innerWidth")
        SHOTS.mkdir(parents=True, exist_ok=True)
        p.screenshot(path=SHOTS / "hostile-390.png", full_page=True)
        rows = list(csv.reader(io.StringIO(page.download("[data-chart=tops] [data-save=csv]"))))
        assert any(row[0].startswith("'=1+1") for row in rows) and not any(row[0].startswith("=") for row in rows)
        page.quiet()
