"""One GPU against two: layerwise, generate and a sweep shared by two processes, a SparseGPT block and steps of heal by torchrun, a model spread over both.

A random Llama of Llama-3.2-1B's shape, written once to a scratch folder. One GPU and two are timed in one run, after a run of each that does
not count (kernels compile, the second process starts and loads; that time is said apart). Tables, points and weights must be the same bits, losses of
heal the same but for the order of the sums. Then the model is spread over both GPUs, and what several commands give on it is set against one GPU.

    python benchmarks/parallel_gpu.py [--parts layerwise,generate,sweep,sparsegpt,heal,sharded] [--shape 1b|7b|tiny]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
import transformers

from prunescope.compare.divergence import Slice, divergence_rows
from prunescope.compare.generation import generation_rows
from prunescope.compare.layerwise import layerwise_rows
from prunescope.data.calibration import Calibration
from prunescope.jobs.options import LoadOptions
from prunescope.jobs.pair import load_pair
from prunescope.jobs.sweep import _measuring
from prunescope.models.dropping import DropSpec
from prunescope.models.loading import load_model
from prunescope.prune.search import choose_jointly
from prunescope.runs.workers import processes, sharing
from prunescope.sweep.bench import Bench, SweepPlan
from prunescope.sweep.comparison import write_texts
from prunescope.sweep.points import read_points
from prunescope.tasks.evaluate import evaluate_model

SHAPES: dict[str, dict[str, int]] = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064},
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256},
}  # fmt: skip
DROP = "drop:attn=1;mlp=2"
PARTS = "layerwise,generate,sweep,sparsegpt,heal,sharded"


def make_model(folder: Path, shape: str, device: str, dtype: torch.dtype) -> None:
    """Random weights, and a tokenizer of single characters."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **SHAPES[shape], max_position_embeddings=4096, tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )  # fmt: skip
    with torch.device(device):
        model = transformers.LlamaForCausalLM._from_config(config, dtype=dtype)
    model.save_pretrained(folder)
    signs = ["<pad>", "<s>", "</s>", "<unk>", "\n", *map(chr, range(32, 127))]
    inner = Tokenizer(models.WordLevel({sign: i for i, sign in enumerate(signs)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    found = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, found


def digest(table: pa.Table) -> str:
    """Of every number, to the last bit."""
    found = hashlib.sha256()
    for name in table.column_names:
        column = table[name].combine_chunks()
        while pa.types.is_list(column.type):
            column = column.flatten()
        values = column.to_numpy(zero_copy_only=False)
        found.update(repr(values.tolist()).encode() if values.dtype == object else values.tobytes())
    return found.hexdigest()


def say(part: str, one: float, two: float, same: bool, note: str = "") -> None:
    print(f"{part}: {one:.2f} s with one, {two:.2f} s with two, ratio {one / two:.2f}; the same bits: {same}{note}", flush=True)  # fmt: skip


def shared(folder: Path, options: argparse.Namespace, parts: list[str]) -> None:
    """What `--workers 2` shares."""
    loading = LoadOptions("auto", options.device, None, False)
    dense, _ = load_pair(str(folder), DROP, loading)
    generator = torch.Generator().manual_seed(1)
    lengths = [24 + i % 9 for i in range(options.prompts)]
    prompts = [torch.randint(5, 90, (length,), generator=generator).tolist() for length in lengths]
    common = {"max_new_tokens": options.steps, "stop": False, "batch_size": options.batch}
    few = prompts[: 2 * options.batch]
    with processes(2, partial(load_pair, str(folder), DROP, loading), dense.device) as workers:
        seconds, _ = timed(lambda: workers.hands(2, len)[1].prepare(_nothing).result())
        print(f"the second process starts and loads in {seconds:.1f} s", flush=True)
        target = DropSpec.parse(DROP.removeprefix("drop:"))
        rows: dict[str, Callable[..., Any]] = {
            "layerwise": partial(layerwise_rows, dense, target, **common),
            "generate": partial(generation_rows, dense, target, **common),
        }
        for name, work in rows.items():
            if name in parts:
                work(few), work(few, workers=workers)
                (one, a), (two, b) = timed(partial(work, prompts)), timed(partial(work, prompts, workers=workers))
                note = f" ({len(a.table)} rows, {len(prompts)} prompts, {options.steps} steps)"
                say(name, one, two, digest(a.table) == digest(b.table), note)
        if "sweep" in parts:
            points = read_points("attn,mlp", "1..4", None, None, None, None, None)[:8]
            layers = {"attn": DropSpec(tuple(range(4))), "mlp": DropSpec((), tuple(range(4)))}
            specs = {p.name: DropSpec(layers[str(p.drops_of)].attn[: p.n], layers[str(p.drops_of)].mlp[: p.n]) if p.dropped else DropSpec() for p in points}  # fmt: skip
            plan = SweepPlan(
                ["reversal-gen", "arithmetic-mc"],
                {"limit": options.items, "shots": 2, "batch_size": 8, "seed": 0, "allow_code_execution": False, "data": None},
                write_texts(dense, prompts[:8], 16, batch_size=8), {"seed": 0}, specs,
            )  # fmt: skip
            bench, make = Bench(dense, plan), partial(_measuring, plan=plan)

            def measured(points: Any, workers: Any) -> dict[int, Any]:
                found: dict[int, Any] = {}
                sharing(workers, make)(points, bench.measure, found.__setitem__)
                return found

            measured(points[:2], None), measured(points[:2], workers)
            (one, a), (two, b) = timed(lambda: measured(points, None)), timed(lambda: measured(points, workers))
            first, second = ([{k: v for k, v in found[i].info.items() if k != "seconds"} for i in range(len(points))] for found in (a, b))  # fmt: skip
            same = repr(first) == repr(second) and all(a[i].items.equals(b[i].items) for i in a)
            say("sweep", one, two, same, f" ({len(points)} points, {options.items} items of two tasks)")


def _nothing(*_: Any) -> Any:
    return len


def sparsegpt_block(folder: Path, options: argparse.Namespace, shares: int) -> None:
    """A block by the processes that there are; the first prints seconds and a hash of the weights."""
    from prunescope.models.blockwise import stream_model
    from prunescope.prune.blocks import prune_block
    from prunescope.prune.masks import Goal
    from prunescope.prune.plan import make_plan
    from prunescope.prune.team import Pieces, joined

    quiet = type("Quiet", (), {"__call__": lambda self, done: None, "note": lambda self, text: None})()
    with joined(options.device, shares) as team, torch.no_grad(), tempfile.TemporaryDirectory() as scratch:
        streamed = stream_model(str(folder), Path(scratch), device=options.device)
        plan = make_plan(streamed, "sparsegpt", Goal(0.5))
        generator = torch.Generator().manual_seed(2)
        tokens = torch.randint(5, 90, (options.samples, options.length), generator=generator)
        text = Pieces(
            team,
            streamed,
            tokens,
            max(1, min(8192 // options.length, options.samples // 2)),
            2**36,
            Path(scratch) / "text.bin",
        )
        found: list[float] = []
        digests = []
        for layer in range(2):  # the first does not count

            def block(layer: int = layer) -> None:
                prune_block(streamed, plan, layer, text, quiet, team)
                text.run(layer, keep=True, advance=quiet)

            with streamed.block(layer):
                team.all(0)
                found.append(timed(block)[0])
                weights = [
                    matrix.weight.float().cpu().contiguous().numpy().tobytes() for matrix in streamed.matrices(layer)
                ]
                digests.append(hashlib.sha256(b"".join(weights)).hexdigest())
        if team.rank == 0:
            print(json.dumps({"seconds": found[1], "digest": digests}), flush=True)


def by_torchrun(name: str, folder: Path, more: list[str]) -> list[dict[str, Any]] | None:
    """What this script prints with ``more`` options as one process and as two of torchrun; None where it fails, which is said."""
    own = [str(Path(__file__).resolve()), "--folder", str(folder), *more]
    found = []
    for count in (1, 2):
        start = [] if count == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        done = subprocess.run([sys.executable, *start, *own], capture_output=True, text=True, env=os.environ | {"PYTHONWARNINGS": "ignore"})  # fmt: skip
        if done.returncode:
            print(f"{name} with {count}: failed\n{done.stderr[-2000:]}", flush=True)
            return None
        found.append(json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{"))))
    return found


def sparsegpt(folder: Path, options: argparse.Namespace) -> None:
    more = ["--device", options.device, "--samples", str(options.samples), "--length", str(options.length)]
    found = by_torchrun("sparsegpt", folder, [*more, "--block", "2"])
    if found is not None:
        note = f" (block of {options.samples} samples of {options.length} tokens, two shares)"
        say("sparsegpt", found[0]["seconds"], found[1]["seconds"], found[0]["digest"] == found[1]["digest"], note)


def heal_steps(folder: Path, options: argparse.Namespace) -> None:
    """Steps of heal by the processes that there are; the first prints the median seconds of a step, those of the sums of all gradients in it, and the
    losses. Texts are of equal lengths, random words; the target is the dense model without four sublayers and with noise on its weights."""
    from prunescope.prune import heal as engine
    from prunescope.prune.heal_team import add_gradients
    from prunescope.prune.team import joined
    from prunescope.prune.trainable import make_trainable

    with joined(options.device, None) as team:
        device = "cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu"
        student = load_model(folder, device=device, dtype="float32", drop="attn=1,3;mlp=0,2")
        teacher = load_model(folder, device=device, dtype="bfloat16" if device == "cuda" else "float32")
        torch.manual_seed(4)
        with torch.no_grad():
            for parameter in student.model.parameters():
                parameter.add_(torch.randn(parameter.shape, device=device), alpha=0.002)
        generator = torch.Generator().manual_seed(4)
        words = torch.randint(5, 90, (options.steps_heal * options.texts, options.text_length), generator=generator).tolist()  # fmt: skip
        logits = 2**27 if device == "cuda" else 2**24
        plan = engine.HealPlan(steps=options.steps_heal, batch_size=options.texts, micro_batch=options.micro_batch, warmup=0,
                               learning_rate=1e-5, chunk=max(16, logits // student.anatomy.vocab_size))  # fmt: skip
        trained = make_trainable(student)
        parameters = list(trained.parameters.values())
        optimiser = torch.optim.AdamW(parameters, fused=device == "cuda")
        seconds, losses = [], []
        for step in range(plan.steps):
            batch = [(row[:1], row[1:]) for row in words[step * options.texts : (step + 1) * options.texts]]
            team.all(0)
            taken, row = timed(partial(engine._step, student, teacher, trained, optimiser, batch, plan, step, team))
            seconds.append(taken)
            losses.append(row["loss"])
        team.all(0)
        sums = [timed(partial(add_gradients, team, parameters))[0] for _ in range(3)]
        if team.rank == 0:
            later = sorted(seconds[2:])  # the first two make kernels and the optimiser's means
            peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
            print(json.dumps({"seconds": later[len(later) // 2], "all": seconds, "sums": min(sums), "losses": losses, "peak": peak,
                              "trained": sum(p.numel() for p in parameters)}), flush=True)  # fmt: skip


def heal(folder: Path, options: argparse.Namespace) -> None:
    names = ("device", "texts", "text_length", "steps_heal", "micro_batch")
    more = [word for name in names for word in (f"--{name.replace('_', '-')}", str(getattr(options, name)))]
    found = by_torchrun("heal", folder, [*more, "--heal-steps"])
    if found is not None:
        one, two = found
        off = max(abs(a - b) / a for a, b in zip(one["losses"], two["losses"], strict=True))
        print(f"heal: {one['seconds']:.3f} s a step with one, {two['seconds']:.3f} s with two, ratio {one['seconds'] / two['seconds']:.2f}; "
              f"losses of {len(one['losses'])} steps differ by at most {off:.1e} of themselves ({options.texts} texts of {options.text_length} tokens, "
              f"{one['trained'] / 1e6:,.1f} M weights, gradients of all added in {two['sums']:.3f} s, peak {one['peak'] / 2**30:.1f} and {two['peak'] / 2**30:.1f} GiB)", flush=True)  # fmt: skip


def sharded(folder: Path, options: argparse.Namespace) -> None:
    """What commands give on a model over both GPUs, against one GPU that decodes in the same way."""
    if torch.cuda.device_count() < 2:
        print("sharded: left out, it takes two GPUs", flush=True)
        return
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(5, 90, (20 + i,), generator=generator).tolist() for i in range(8)]
    texts = [torch.randint(5, 90, (16,), generator=generator).tolist() for _ in prompts]
    chunks = torch.randint(5, 90, (4, 256), generator=generator)
    target = DropSpec.parse(DROP.removeprefix("drop:"))
    found: list[dict[str, str]] = []
    for device in ("cuda:0", "gpus"):
        dense = load_model(folder, device=device)
        if device == "gpus":
            print(f"spread over {sorted(set(map(str, dense.model.hf_device_map.values())))}, head on {dense.device}", flush=True)  # fmt: skip
        dense.decoding |= dict.fromkeys(("", str(target)), "the same way as on two GPUs")
        calibration = Calibration(tokens=chunks, source="random", seed=0)
        judged = lambda dense=dense, calibration=calibration: repr(choose_jointly(dense, calibration, "attn", 2, "kl", batch_size=4).rows)  # noqa: E731  # fmt: skip
        works: dict[str, Callable[[], str]] = {
            "layerwise": lambda dense=dense: digest(layerwise_rows(dense, None, prompts, texts=texts, max_new_tokens=16, stop=False).table),
            "layerwise of a target": lambda dense=dense: digest(layerwise_rows(dense, dense, prompts, texts=texts, max_new_tokens=16, stop=False).table),
            "layerwise, final norm": lambda dense=dense: digest(layerwise_rows(dense, target, prompts, texts=texts, max_new_tokens=16, stop=False, lens="final-norm").table),
            "generate": lambda dense=dense: digest(generation_rows(dense, target, prompts, max_new_tokens=16, stop=False).table),
            "divergence": lambda dense=dense: digest(divergence_rows(dense, target, [Slice("text", chunks, chunks.numel())]).table),
            "drop --select kl": judged,
            "evaluate": lambda dense=dense: repr(evaluate_model(dense, ["reversal-gen", "arithmetic-mc"], limit=8, shots=1).items.to_pylist()),
        }  # fmt: skip
        results = {}
        for name, work in works.items():
            try:
                seconds, results[name] = timed(work)
                if device == "gpus":
                    print(f"sharded {name}: {seconds:.2f} s; equal to one GPU: {results[name] == found[0][name]}", flush=True)  # fmt: skip
            except Exception as error:  # the others are still of interest
                results[name] = "failed"
                print(f"sharded {name}: {type(error).__name__} on {device}: {error}", flush=True)
        found.append(results)
        del dense, works, judged
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", default=PARTS)
    parser.add_argument("--shape", choices=list(SHAPES), default="1b")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--items", type=int, default=32)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--texts", type=int, default=32, help="of heal, a step")
    parser.add_argument("--text-length", type=int, default=512, help="of heal")
    parser.add_argument("--steps-heal", type=int, default=12)
    parser.add_argument(
        "--micro-batch", type=int, default=16, help="of heal; the products of both runs have then the same sizes"
    )
    parser.add_argument("--folder", help="of a model that is there already; left out, a random one is made")
    parser.add_argument("--heal-steps", action="store_true", help=argparse.SUPPRESS)  # how this script calls itself
    parser.add_argument("--block", type=int, default=0, help=argparse.SUPPRESS)  # how this script calls itself
    options = parser.parse_args()
    if options.block:
        sparsegpt_block(Path(options.folder), options, options.block)
        return
    if options.heal_steps:
        heal_steps(Path(options.folder), options)
        return
    parts = options.parts.split(",")
    on_gpu = options.device != "cpu" and torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(options.folder or Path(scratch) / "model")
        if options.folder is None:
            seconds, _ = timed(lambda: make_model(folder, options.shape, "cuda" if on_gpu else "cpu", torch.bfloat16 if on_gpu else torch.float32))  # fmt: skip
            print(f"model made in {seconds:.1f} s", flush=True)
        if {"layerwise", "generate", "sweep"} & set(parts):
            shared(folder, options, parts)
            if on_gpu:
                torch.cuda.empty_cache()
        if "sparsegpt" in parts:
            sparsegpt(folder, options)
        if "heal" in parts:
            heal(folder, options)
        if "sharded" in parts:
            sharded(folder, options)


if __name__ == "__main__":
    main()
