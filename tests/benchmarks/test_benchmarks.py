"""Every script of `benchmarks/` at a toy size on a CPU. Nothing is timed here: a documented command must run, and say what it says it says."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest

import prunescope
from families import characters_folder, tiny_folder

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "benchmarks"

# script -> options of a toy run, and words of its last results; {folder} is a scratch folder with tiny models, texts and a page in it
TOYS: dict[str, tuple[str, tuple[str, ...]]] = {
    "divergence_gpu.py": (
        "--device cpu --dtype float32 --layers 2 --width 64 --inner 96 --heads 4 --kv-heads 2 --vocab 512 --chunks 2 --context 16",
        ("against float64 on the same states", "x the passes with logits"),
    ),
    "generation_cpu.py": (
        "--model {folder}/chars --steps 2 --prompts 2 --rounds 1",
        ("batch 2: two plain generate()", "its floor"),
    ),
    "generation_gpu.py": (
        "--small --device cpu --batch 2 --length 6 --steps 6 --rounds 1 --rows 4 --skip-families",
        ("the same bits", "ratio", "generate with all columns"),
    ),
    "generation_gpu.py:experts": (  # the same script, another way to run it
        "--family moe --small --device cpu --batch 2 --length 6 --steps 6 --rounds 1 --skip-families",
        ("experts of a block are chosen", "graph, experts chosen", "the same bits", "generate(): "),
    ),
    "heal_choice.py": (
        "--model {folder}/chars --out {folder}/choice --device cpu --ways attn_1,sparsegpt_2:4 --samples 8 --new-tokens 4 --held-out 2 --steps 1 --batch-size 2"
        " --judged 3 --choose-samples 2 --choose-tokens 4 --sparse-samples 2 --sparse-tokens 8",
        ("zeros_kept", "healed_less_cosine", "heal-choice.png"),
    ),
    "heal_gpu.py": (
        "--device cpu --layers 2 --width 32 --inner 48 --heads 2 --kv-heads 2 --vocab 256 --batch 2 --length 8 --steps 1",
        ("s a million tokens", "x the floor"),
    ),
    "heal_job.py": (
        "--model {folder}/chars --prompts {folder}/prompts.txt --out {folder}/healed --tasks reversal-mc --limit 2 --samples 8 --new-tokens 4 --steps 2 --batch-size 2 --device cpu"
        " --ways=block_1,magnitude_0.5",
        ("held-out KL", "report.html"),
    ),
    "heal_kept.py": (
        "{folder}/kept.json --out {folder}/kept.png",
        # (1/2 + 1/4) / 2; all items together would be 2 of 6
        ("attn 1 cosine  keeps 37.5 %", "attn: cosine has lost half at n = 1: cosine 37.5 %, healed 75.0 %", "written:"),
    ),
    "layerwise_cpu.py": ("--steps 1 --layers 2 --width 32 --vocab 512", ("floor of bytes", "x floor of operations")),
    "layerwise_gpu.py": (
        "--device cpu --dtype float32 --layers 2 --width 64 --inner 96 --heads 4 --kv-heads 2 --vocab 512 --prompts 2 --steps 4 --prompt-length 4 --target",
        ("two runs equal to the bit: True", "drop of every sublayer", "against a target model"),
    ),
    "parallel_gpu.py": (  # sweep, sparsegpt and heal: make test-workers
        "--shape tiny --device cpu --parts layerwise,generate,sharded --prompts 4 --steps 3 --batch 1",
        ("layerwise: ", "ratio", "the same bits: True", "sharded: left out"),
    ),
    "products_gpu.py": ("--small --device cpu --batch 2", ("cuBLAS, 3 calls", "(as it is set)", "1 cuts")),
    "report_large.py": ("{folder}/run --gb 0.0002", ("s of a core, peak", "MB")),
    "report_page.py": ("{folder}/page.html --runs 1", ("first contentful paint", "all charts drawn: True")),
    "sparsify_cpu.py": ("--shapes tiny --repeats 1 --samples 2 --length 64", ("times as fast", "objective at 2:4")),
    "sparsify_gpu.py": (
        "--shape tiny --samples 2 --length 128 --repeats 1 --published --batches 1",
        ("BLOCK 0.5", "x the floor", "sparsegpt 2:4"),
    ),
    "sparsify_memory.py": ("--shape tiny --blocks 2 --tokens 1024 --folder {folder}", ("peak", "x the floor", "s a block")),
    "sparsify_perplexity.py": (
        "--model {folder}/words --calibration {folder}/words.txt --perplexity {folder}/words.txt --device cpu --samples 2 --seq-len 16 --perplexity-windows 2",
        ("RESULT sparsegpt", "SparseGPT <= Wanda < magnitude"),
    ),
    "sparsify_refine.py": (
        "--model {folder}/chars --device cpu --samples 3 --seq-len 8 --held-out 2 --goals 2:4 --ways none,swaps-admm",
        ("held out: 2 texts", "RESULT sparsegpt 2:4 swaps-admm"),
    ),
    "sparsify_refine_layers.py": (
        "--model {folder}/words --text {folder}/words.txt --layers 0,2 --samples 8 --seq-len 16 --device cpu",
        ("matrices", "RESULT wanda     0.5  admm-gradual"),
    ),
    "sweep_bytes.py": (
        "--model {folder}/chars --out {folder}/bytes --parts 2 --limit 2 --device cpu",
        ("mlp-002: nDCG@10", "retrieved", "written:", "dense  "),
    ),
    "stream_gpu.py": (
        "--shape tiny --device cpu --dtype float32 --prompts 2 --length 6 --steps 2 --chunks 2 --context 16 --repeats 1 --check --folder {folder}/sides",
        ("layerwise  ", "x the floor", "the same bits as in memory: True", "divergence, the same bits: True"),
    ),
    "stream_memory.py": (
        "--shape tiny --blocks 2 --chunks 2 --context 16 --steps 2 --commands drop --check --folder {folder}/streamed",
        ("drop --stream: peak", "x the floor", "the same bits: True"),
    ),
    "sweep_figure1.py": ("--model {folder}/chars --out {folder}/figure1 --n 1 --target attn --limit 2 --device cpu", ("written",)),
}  # fmt: skip


def test_no_script_is_left_out() -> None:
    assert sorted({name.split(":")[0] for name in TOYS}) == sorted(path.name for path in SCRIPTS.glob("*.py"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("toys")
    characters_folder(place / "chars")
    tiny_folder("llama", place / "words")
    (place / "prompts.txt").write_text("".join(f"what is {i}\n" for i in range(6)), "utf-8")
    scores = {"dense": ("1100", "1111"), "cosine": ("0100", "1000"), "healed": ("1100", "0110")}
    rows = [
        {"target": "attn", "n": 1, "how": how, "items": {"gsm8k": first, "humaneval": second}}
        for how, (first, second) in scores.items()
    ]
    (place / "kept.json").write_text(json.dumps({"model": "tiny", "rows": rows}), "utf-8")
    (place / "words.txt").write_text(" ".join(f"w{4 + i % 50}" for i in range(400)), "utf-8")
    return place


@pytest.mark.parametrize("name", TOYS)
def test_a_benchmark_runs(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """In this process, which has the libraries loaded. `sparsify_gpu.py` called a function that no longer existed, and nobody saw it."""
    options, said = TOYS[name]
    if name.startswith("report_"):
        if name == "report_page.py" and not (shutil.which("chromium") or shutil.which("chromium-browser")):
            pytest.skip("chromium is not installed; make test installs it")
        (folder / "p.txt").write_text("cat\n", "utf-8")
        found = prunescope.layerwise(
            str(folder / "chars"), prompts=str(folder / "p.txt"), max_new_tokens=2, device="cpu"
        )
        found.save(folder / "run", overwrite=True)
        prunescope.report([str(folder / "run")], out=str(folder / "page.html"), overwrite=True)
    monkeypatch.syspath_prepend(str(SCRIPTS))  # they import from one another
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [name, *options.format(folder=folder).split()])
    runpy.run_path(str(SCRIPTS / name.split(":")[0]), run_name="__main__")
    captured = capfd.readouterr()
    for words in said:
        assert words in captured.out + captured.err
