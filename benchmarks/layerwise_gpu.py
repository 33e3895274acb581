"""Layerwise comparison on a GPU: time per decoding step with every sublayer dropped in turn, and against a target, at the shape of a 7B model.

Builds a model of Qwen2.5-7B's shape with random bfloat16 weights, checks the kernels' columns against float64, and times forward pass and all
columns of given token sequences. Floors, measured in the same run: the operations of the product of the distinct streams with the
head (57 rows a step) and of the forward passes, over the rate of a large bfloat16 product; and for the kernels one read of their logits,
over the bandwidth of a large copy.

    python benchmarks/layerwise_gpu.py [--prompts 32] [--steps 256] [--batch-size 8] [--memory-mb 768] [--table] [--profile]
    python benchmarks/layerwise_gpu.py --device cpu --layers 2 --width 64 --vocab 512 --prompts 2 --steps 4

Does not time sampling of the text, the noise floor, or the writing of files.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from prunescope.compare.columns import compare
from prunescope.compare.context import Transcript
from prunescope.compare.head import Head
from prunescope.compare.kernels import sums as fused
from prunescope.compare.layerwise import batch_rows, begin_batch, lens_head
from prunescope.compare.metrics import ERROR_BOUND, compare_hidden, compare_logits
from prunescope.compare.streams import Ahead, forward_stream, streams_of
from prunescope.models.anatomy import find_anatomy
from prunescope.models.loaded import LoadedModel
from prunescope.runs.workers import alone


def seconds(work: Callable[[], object], device: str, repeats: int = 3) -> float:
    """Median time of ``work``, on CUDA events where there are any."""
    work()
    times = []
    for _ in range(repeats):
        if device == "cpu":
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
            continue
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        work()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return sorted(times)[len(times) // 2]


def build(options: argparse.Namespace, seed: int) -> LoadedModel:
    """A Qwen2 model with random weights; the tokenizer is never used."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=options.vocab, hidden_size=options.width, intermediate_size=options.inner, num_hidden_layers=options.layers,
        num_attention_heads=options.heads, num_key_value_heads=options.kv_heads, tie_word_embeddings=False, max_position_embeddings=32768,
    )  # fmt: skip
    with torch.device(options.device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype)).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    tokenizer: Any = SimpleNamespace(pad_token_id=0, eos_token_id=None, get_vocab=dict)
    layers = tuple(range(options.layers))
    return LoadedModel(f"random-{seed}", model, tokenizer, find_anatomy(model), {}, layers, options.layers)


def check(
    head: Head, streams: torch.Tensor, pairs: torch.Tensor, memory: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Worst error of each column, in units of its bound: of the kernels on their own logits, and of everything against a float64 product."""
    following = torch.arange(len(pairs)) % head.vocab_size
    found = compare(streams, pairs, head, next_token=following, memory=memory)
    used, place = torch.unique(pairs, return_inverse=True)
    h = streams[used.to(streams.device)]
    errors: list[dict[str, float]] = []
    for z in (head.logits(h).double(), head.logits(h.double(), torch.float64)):
        worst: dict[str, float] = {}
        for k in range(len(pairs)):
            i, j = place[k].tolist()
            exact = compare_logits(z[i : i + 1], z[j : j + 1], 1.0, following[k : k + 1].to(z.device))
            exact |= compare_hidden(h[i : i + 1], h[j : j + 1])
            for name, value in exact.items():
                relative, absolute = ERROR_BOUND[name]
                if relative + absolute > 0:
                    error = (found[name][k] - value.cpu()[0]).abs() / (relative * value.cpu()[0].abs() + absolute)
                else:
                    error = (found[name][k] != value.cpu()[0]).double() * 99
                worst[name] = max(worst.get(name, 0.0), float(error))
        errors.append(worst)
    return errors[0], errors[1]


def worst(errors: dict[str, float], count: int = 5) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in sorted(errors.items(), key=lambda item: -item[1])[:count])


def massive(streams: torch.Tensor, size: float) -> torch.Tensor:
    """The same streams with three huge entries, nearly the same in all rows, as trained models have them."""
    out = streams.clone()
    drift = torch.randn(len(out), 3, device=out.device) * size * 0.01
    for k, (column, value) in enumerate(((5, size), (77 % out.shape[1], -size / 2), (130 % out.shape[1], size / 8))):
        out[:, column] = (value + drift[:, k]).to(out.dtype)
    return out


def machine(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """Operations a second of a large product, and bytes a second of a large copy, read and written."""
    n = 8192 if device != "cpu" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    big = torch.randn(2**29 if device != "cpu" else 2**24, device=device)
    other = torch.empty_like(big)
    return 2 * n**3 / seconds(lambda: a @ b, device, 7), 2 * big.nbytes / seconds(lambda: other.copy_(big), device, 7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (
        ("layers", 28), ("width", 3584), ("inner", 18944), ("heads", 28), ("kv-heads", 4), ("vocab", 152064),
        ("prompts", 32), ("steps", 256), ("prompt-length", 32), ("batch-size", 8), ("memory-mb", 768),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    for name in ("table", "profile", "target", "skip-check"):
        parser.add_argument(f"--{name}", action="store_true")
    options = parser.parse_args()
    device, memory, steps = options.device, options.memory_mb * 2**20, options.prompts * options.steps
    cuda = device != "cpu"
    dtype = getattr(torch, options.dtype)
    print(f"{torch.cuda.get_device_name() if cuda else 'CPU'}, torch {torch.__version__}, {options.dtype}")

    rate, bandwidth = machine(device, dtype)
    print(f"product {rate / 1e12:.0f} TFLOP/s, copy {bandwidth / 1e12:.2f} TB/s (bytes read and written)")

    dense = build(options, 0)
    head = lens_head(dense, "raw")
    generator = torch.Generator().manual_seed(1)
    length = options.prompt_length + options.steps
    tokens = torch.randint(0, options.vocab, (options.prompts, length), generator=generator).tolist()
    sequences = [Transcript(t[: options.prompt_length], t[options.prompt_length :]) for t in tokens]
    batches = [sequences[i : i + options.batch_size] for i in range(0, len(sequences), options.batch_size)]
    resident = torch.cuda.memory_allocated() if cuda else 0

    if not options.skip_check:
        few = streams_of(dense, None, [Transcript(s.prompt, s.continuation[:2]) for s in sequences[:2]])
        rows, pairs = few.flat()
        tiny = rows.float() * (1 + 1e-6 * torch.randn(rows.shape, device=rows.device))
        for name, streams, chosen in (
            ("streams of the model", rows, pairs),
            ("with massive activations (4000)", massive(rows, 4000.0), pairs),
            ("deviation 1e-6, float32 streams", torch.cat([rows.float(), tiny]), torch.stack([torch.arange(20), torch.arange(20) + len(rows)], 1)),
        ):  # fmt: skip
            own, whole = check(head, streams, chosen[:: max(1, len(chosen) // 40)], memory)
            print(f"check, {name}: error / bound of the kernels {worst(own)}\n    with the product {worst(whole, 12)}")
        again = [compare(rows, pairs, head, memory=memory) for _ in range(2)]
        print("two runs equal to the bit:", all(torch.equal(again[0][c], again[1][c]) for c in again[0]))
        itself = compare(
            torch.cat([rows, rows]),
            torch.stack([torch.arange(len(rows)), torch.arange(len(rows)) + len(rows)], 1),
            head,
            memory=memory,
        )
        print(
            "rows against themselves, largest deviation:",
            max(
                itself[c].abs().max().item()
                for c in ("h_cos_dev", "z_cos_dev", "kl_dense_target", "js", "tv", "dz_rms", "p_cos_dev")
            ),
        )

    distinct = 2 * options.layers + 1
    parameters = sum(
        p.numel() for name, p in dense.model.named_parameters() if "embed" not in name and "lm_head" not in name
    )
    floor = distinct * 2 * options.width * options.vocab / rate
    forward_floor = 2 * parameters * (length - 1) / options.steps / rate

    def whole(target: Any = None, size: int = options.batch_size) -> None:
        """As `layerwise_rows` does it: a batch is begun before the one before is waited for."""
        forward = forward_stream(dense, target, size * options.steps)
        order = [range(i, min(i + size, len(sequences))) for i in range(0, len(sequences), size)]
        rows = Ahead(
            lambda batch: begin_batch(dense, target, [sequences[i] for i in batch], head, 1.0, memory, 0, forward),
            forward is not None,
        )
        alone(order, rows, lambda _, table: None)

    def report(name: str, taken: float, floor: float) -> None:
        print(f"{name:58s} {taken * 1e3:9.4f} ms a step, floor {floor * 1e3:.4f} = {taken / floor:.2f} x")

    if cuda:
        torch.cuda.reset_peak_memory_stats()
    runs = sorted(seconds(whole, device, 1) / steps for _ in range(5))
    total = runs[2]
    extra = torch.cuda.max_memory_allocated() - resident if cuda else 0
    started = time.perf_counter()
    whole()
    wall = (time.perf_counter() - started) / steps
    report(f"drop of every sublayer, {options.prompts} prompts x {options.steps} steps", total, floor + forward_floor)
    print(
        f"    five runs {runs[0] * 1e3:.4f} to {runs[-1] * 1e3:.4f}; wall clock {wall * 1e3:.4f} ms a step; memory beyond the model {extra / 1e9:.2f} GB"
    )

    streams = [streams_of(dense, None, batch) for batch in batches[:1]]
    share = len(batches[0]) * options.steps
    report(
        "forward pass with streams", seconds(lambda: streams_of(dense, None, batches[0]), device) / share, forward_floor
    )
    flat, pairs = streams[0].flat()
    following = torch.zeros(len(pairs), dtype=torch.int64)
    report(
        "all columns",
        seconds(lambda: compare(flat, pairs, head, next_token=following, memory=memory), device) / share,
        floor,
    )
    chunk = min(len(flat), max(2, memory // (4 * options.vocab) // 128 * 128))
    z = torch.empty(chunk, fused.padded(options.vocab), device=device)[:, : options.vocab]
    report(
        f"product of {chunk} rows",
        seconds(lambda: head.logits(flat[:chunk], out=z), device, 7) / chunk * distinct,
        floor,
    )
    kernels = fused.backend(z.device, torch.float32)
    if kernels is not None:
        index = torch.stack([torch.arange(1, chunk), torch.arange(chunk - 1)], 1).to(z.device)
        read = z.shape[1] * 4 * distinct / bandwidth
        report("row sums (one read)", seconds(lambda: kernels.row_sums(z, 1.0), device, 7) / chunk * distinct, read)
        sums, top = kernels.row_sums(z, 1.0)
        known = kernels.prepare(z, index, sums, top, 1.0, None, None)
        report(
            "pair sums (one read)",
            seconds(lambda: kernels.sweep(z, index, known, 1.0), device, 7) / chunk * distinct,
            read,
        )
        report(
            "row statistics and pilots",
            seconds(lambda: kernels.prepare(z, index, sums, top, 1.0, None, None), device, 7) / chunk * distinct,
            read,
        )
    streams.clear()
    if options.profile:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            batch_rows(dense, None, batches[0], head, 1.0, memory)
        print(seen.key_averages().table(sort_by="self_cuda_time_total", row_limit=22, max_name_column_width=60))
    if options.target:
        target = build(options, 1)
        if cuda:
            resident = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        both = (4 * options.layers + 1) * 2 * options.width * options.vocab / rate + 2 * forward_floor
        for size in (max(1, options.batch_size // 2), options.batch_size):  # the streams of two models are held
            total = seconds(lambda size=size: whole(target, size), device) / steps  # type: ignore[misc]
            report(f"against a target model, {size} prompts at a time", total, both)
            if cuda:
                print(f"    memory beyond the two models {(torch.cuda.max_memory_allocated() - resident) / 1e9:.2f} GB")
        del target
    if options.table:
        table(dense, options, memory)


def table(dense: LoadedModel, options: argparse.Namespace, memory: int) -> None:
    """Time against steps, prompts, blocks and vocabulary; each line is one call, in batches of one or eight prompts."""
    generator = torch.Generator().manual_seed(2)

    def taken(model: LoadedModel, vocab: int, prompts: int, steps: int, size: int) -> float:
        length = options.prompt_length + steps
        tokens = torch.randint(0, vocab, (prompts, length), generator=generator).tolist()
        some = [Transcript(t[: options.prompt_length], t[options.prompt_length :]) for t in tokens]
        head = lens_head(model, "raw")
        batches = [some[i : i + size] for i in range(0, prompts, size)]
        return seconds(
            lambda: [batch_rows(model, None, batch, head, 1.0, memory) for batch in batches], options.device, 3
        )

    for steps in (64, 256, 1024, 4096):
        time_ = taken(dense, options.vocab, 1, steps, 1)
        print(f"steps   {steps:7d} (1 prompt):            {time_:8.3f} s, {time_ / steps * 1e3:.4f} ms a step")
    for prompts in (8, 16, 32):
        time_ = taken(dense, options.vocab, prompts, 256, 8)
        print(f"prompts {prompts:7d} (256 steps, by 8):    {time_:8.3f} s, {time_ / prompts / 256 * 1e3:.4f} ms a step")
    for name, values in (("layers", (7, 14)), ("vocab", (32_000, 76_032))):
        for value in values:
            changed = argparse.Namespace(**(vars(options) | {name: value}))
            time_ = taken(build(changed, 3), changed.vocab, 8, 256, 8)
            print(f"{name:7s} {value:7d} (8 prompts x 256):    {time_:8.3f} s, {time_ / 2048 * 1e3:.4f} ms a step")


if __name__ == "__main__":
    main()
