"""Writing with two 7B models: a step of both against the time of reading their weights; the claim is at most 2 times.

What is measured: two Qwen2 models of random bfloat16 weights in the shape of Qwen2.5-7B (15.2 GB each) write the same prompts, 32 at a time,
through `prunescope.models.decoding`, greedy, the final state of every step kept. Steps are timed between two CUDA events, the first before step 4,
so that reading the prompts and capturing the graph are left out; they are printed beside it. The floor is the weights of both
models over the bandwidth measured in the same run. The answer is checked first: on tiny float32 models of every family of the tests token by
token against `generate()`, dense and dropped, and on the large ones by the share of equal tokens and the error of the states.

`--family moe` and `--family mixtral` take one model with experts instead (8.1 and 7.5 thousand million parameters, bfloat16), 32 texts, 8 and one:
a step in the graph by the way the experts are computed, against `generate()` and against reading the weights that a step needs, which are
those of the experts that some text chose, counted in the same run, and all others but the table of the tokens.

Run: python benchmarks/generation_gpu.py; on a CPU: python benchmarks/generation_gpu.py --small --device cpu (the loop without a graph)
"""

from __future__ import annotations

import copy
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from statistics import mean, median
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import transformers

from prunescope.compare import generation
from prunescope.errors import first_line
from prunescope.models import capturing, decoding, deferring, fusing, gating, generating
from prunescope.models.anatomy import find_anatomy
from prunescope.models.capturing import stacked_experts
from prunescope.models.decoding import decode
from prunescope.models.dropping import DropSpec
from prunescope.models.generating import Sampling, decoding_way, uniform_draws
from prunescope.models.loaded import LoadedModel
from prunescope.models.residual import final_states
from prunescope.speed.timing import measure_rates

SHAPE = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
}
_EXPERTS = {"vocab_size": 151_936, "num_attention_heads": 32, "head_dim": 128, "hidden_size": 2048}
MOE = {  # a Qwen3-30B-A3B of 12 blocks, and a Mixtral of 5
    "moe": {**_EXPERTS, "num_hidden_layers": 12, "num_key_value_heads": 4, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8},
    "mixtral": {**_EXPERTS, "hidden_size": 4096, "vocab_size": 32_000, "num_hidden_layers": 5, "num_key_value_heads": 8, "intermediate_size": 14_336, "num_local_experts": 8, "num_experts_per_tok": 2},
}  # fmt: skip
CLASSES = {
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
    "mixtral": (transformers.MixtralConfig, transformers.MixtralForCausalLM),
}
SMALL = {**SHAPE, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "vocab_size": 512}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2}


def copied(keys: Any, values: Any, new_keys: Any, new_values: Any, position: Any) -> None:
    """As transformers writes its caches of fixed size."""
    keys.index_copy_(2, position, new_keys)
    values.index_copy_(2, position, new_values)


REPLACED: dict[str, list[tuple[Any, str, Any]]] = {  # what --without takes away
    "fusing": [(decoding, "fused", lambda *_: nullcontext())],
    "norms": [(fusing, "norm_way", lambda module: None)],
    "products": [(fusing, "sibling_forwards", lambda *_: {})],
    "activations": [(fusing, "gate_forwards", lambda *_: {})],
    "gated": [(gating, "_together", lambda *_: False)],
    "sums": [(deferring, "_SUMS", ())],
    "cache": [(decoding, "write_token", copied)],
}
TOKENIZER = SimpleNamespace(pad_token_id=0, eos_token_id=None, get_vocab=dict)


def say(text: str) -> None:
    print(text, flush=True)


def build(
    seed: int, shape: dict[str, int], device: torch.device, dtype: torch.dtype, family: str = "qwen2"
) -> LoadedModel:
    config_class, model_class = CLASSES[family]
    config = config_class(**shape, max_position_embeddings=4096, tie_word_embeddings=False)
    config.dtype = dtype
    torch.manual_seed(seed)
    with torch.device("meta"):
        model = model_class(config)
    model = model.to(dtype).to_empty(device=device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0) if name.endswith("norm.weight") else parameter.normal_(0, 0.02)
    with device:
        model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are computed, not loaded
    model.eval()
    blocks = shape["num_hidden_layers"]
    return LoadedModel("random", model, TOKENIZER, find_anatomy(model), {}, tuple(range(blocks)), blocks)


# --- correctness -------------------------------------------------------------------------------------------------------


def both_ways(loaded: LoadedModel, prompts: list[list[int]], steps: int, sampling: Sampling, ends: list[int]) -> Any:
    ids, mask = generating._left_padded(prompts, 0, loaded.device)
    how = (ids, mask, steps, sampling, uniform_draws(sampling, range(len(prompts)), steps), ends, 0, True)
    return generating._write_static(loaded, *how), generating._write_plain(loaded, *how)


def check_families(device: torch.device) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from families import FAMILIES, tiny_model

    prompts = [[5, 9, 11, 4, 60, 8, 33], [7, 3], [21, 40, 41, 42, 13]]
    worst, equal, total = 0.0, 0, 0
    for family in FAMILIES:
        model = tiny_model(family).to(device)
        loaded = LoadedModel(family, model, TOKENIZER, find_anatomy(model), {}, tuple(range(6)), 6)
        for spec in (DropSpec(), DropSpec(attn=(0, 2, 3)), DropSpec(attn=(0, 1, 5), mlp=(1, 2, 5))):
            with loaded.dropping(spec):
                way = "generate(): cpu" if device.type == "cpu" else decoding_way(loaded)
                if way.startswith("generate") and device.type != "cpu":
                    say(f"  {family} {spec}: {way}")
                    continue
                for sampling in (Sampling(), Sampling(0.9, 20, 0.95, 3)):
                    (tokens, states), (expected, expected_states) = both_ways(loaded, prompts, 24, sampling, [])
                    total, equal = total + 1, equal + int(torch.equal(tokens, expected))
                    if torch.equal(tokens, expected):
                        worst = max(worst, float((states - expected_states).abs().max()))
                    else:
                        say(f"  {family} {spec} {sampling}: other tokens")
    say(
        f"tiny float32 models of {len(FAMILIES)} families: {equal} of {total} batches write the same tokens, states within {worst:.1e}"
    )


@torch.no_grad()
def check_large(loaded: LoadedModel, prompts: list[list[int]], steps: int) -> None:
    say(f"large model: {decoding_way(loaded)}")
    (tokens, states), (expected, expected_states) = both_ways(loaded, prompts, steps, Sampling(), [])
    alike = (tokens == expected).cumprod(1)
    read_same = torch.cat([torch.ones_like(alike[:, :1]), alike[:, :-1]], 1).T.bool()  # (steps, batch)
    error = (states.double() - expected_states.double()).norm(dim=-1) / expected_states.double().norm(dim=-1)
    logits = loaded.anatomy.head(states[read_same].to(loaded.dtype)).float()
    others = loaded.anatomy.head(expected_states[read_same].to(loaded.dtype)).float()
    apart = ((logits - others).norm(dim=-1) / others.norm(dim=-1)).max()
    say(
        f"against generate(), {loaded.dtype}: {float(alike.float().mean()):.3f} of the steps up to the first difference, states within "
        f"{float(error[read_same].max()):.1e}, logits within {float(apart):.1e} relative"
    )
    against_float32(loaded, prompts, {"the loop": (tokens, states), "generate()": (expected, expected_states)})
    again, _ = both_ways_static(loaded, prompts, steps)
    order = list(range(len(prompts)))[::-1]
    turned, _ = both_ways_static(loaded, [prompts[i] for i in order], steps)
    say(f"run again: {'the same bits' if torch.equal(again[1], states) else 'OTHER BITS'}; rows in another order: "
        f"{'the same bits' if torch.equal(turned[1][:, order], states) else 'other bits'}")  # fmt: skip


def against_float32(loaded: LoadedModel, prompts: list[list[int]], written: dict[str, Any]) -> None:
    """How far the states of each way are from those of the same weights in float32, given the same tokens; both should be as far."""
    model = copy.deepcopy(loaded.model).float()
    wide = LoadedModel("float32", model, TOKENIZER, find_anatomy(model), {}, loaded.layer_map, loaded.dense_layers)
    ids, mask = generating._left_padded(prompts, 0, loaded.device)
    for name, (tokens, states) in written.items():
        errors = []
        for row in range(0, len(prompts), 8):
            found: list[Any] = []
            text = torch.cat([ids, tokens[:, :-1]], 1)[row : row + 8]
            seen = torch.nn.functional.pad(mask[row : row + 8], (0, tokens.shape[1] - 1), value=1)
            with final_states(wide, found.append):
                places = (seen.cumsum(-1) - 1).clamp(min=0)
                model(input_ids=text, attention_mask=seen, position_ids=places, use_cache=False, logits_to_keep=1)
            exact = found[-1][:, ids.shape[1] - 1 :].transpose(0, 1).double()
            errors.append((states[:, row : row + 8].double() - exact).norm(dim=-1) / exact.norm(dim=-1))
        off = torch.cat(errors, 1)
        say(
            f"  from float32, {name}: {float(off.mean()):.2e} in the mean of all steps and texts, {float(off.max()):.2e} at most"
        )


def both_ways_static(loaded: LoadedModel, prompts: list[list[int]], steps: int) -> Any:
    ids, mask = generating._left_padded(prompts, 0, loaded.device)
    draws = torch.zeros(len(prompts), steps)
    return generating._write_static(loaded, ids, mask, steps, Sampling(), draws, [], 0, True), None


# --- time --------------------------------------------------------------------------------------------------------------


class Clock:
    """Milliseconds between two places of the device's queue; wall time on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def __call__(self, work: Callable[[], object]) -> float:
        began = self.place()
        work()
        return self.between(began, self.place())

    def place(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, began: Any, ended: Any) -> float:
        if not self.cuda:
            return 1000 * (ended - began)  # type: ignore[no-any-return]
        torch.cuda.synchronize()
        return float(began.elapsed_time(ended))


def step_ms(
    models: list[LoadedModel], prompts: list[list[int]], steps: int, rounds: int, clock: Clock
) -> tuple[list[float], float]:
    """Milliseconds of a step of all models, round by round, and of everything before step 4."""
    rows = [one_round(models, prompts, steps, clock) for _ in range(rounds + 1)][1:]
    return [each for each, _ in rows], median(before for _, before in rows)


def one_round(models: list[LoadedModel], prompts: list[list[int]], steps: int, clock: Clock) -> tuple[float, float]:
    """Of all models together: a step from the fourth on, between two places of the device's queue, and what was before it."""
    ids, mask = generating._left_padded(prompts, 0, models[0].device)
    each = before = 0.0
    for loaded in models:
        places: dict[int, Any] = {}
        began = clock.place()

        def mark(number: int, places: dict[int, Any] = places) -> None:
            if number in (4, steps):
                places[number] = clock.place()

        decode(loaded, ids, mask, steps, lambda scores, _: scores.argmax(-1), keep_states=True, mark=mark)
        before += clock.between(began, places[4])
        each += clock.between(places[4], places[steps]) / (steps - 4)
    return each, before


def profile_step(loaded: LoadedModel, prompts: list[list[int]]) -> None:
    """Which kernels a step is made of."""
    from torch.profiler import ProfilerActivity, profile

    ids, mask = generating._left_padded(prompts, 0, loaded.device)
    steps = 12
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        decode(loaded, ids, mask, steps, lambda scores, _: scores.argmax(-1), keep_states=True)
    kernels: dict[str, tuple[int, float]] = {}
    for event in found.key_averages():
        kernels[event.key] = (event.count, event.self_device_time_total)
    for name, (count, spent) in sorted(kernels.items(), key=lambda item: -item[1][1])[:16]:
        say(f"  {spent / 1000:8.2f} ms {count:6d} x  {name[:110]}")


def rows_ms(models: list[LoadedModel], prompts: list[list[int]], args: Namespace, clock: Clock, floor: float) -> None:
    """`generate` with all columns, and what it consists of: both texts, the noise floor (once a run), columns and table."""
    how: dict[str, Any] = {"stop": False, "batch_size": args.batch, "regime": "free-running", "memory": 4 * 2**30}
    generation.generation_rows(models[0], models[1], prompts, max_new_tokens=4, **how)
    took = clock(lambda: generation.generation_rows(models[0], models[1], prompts, max_new_tokens=args.rows, **how))
    say(
        f"generate with all columns, free-running: {took / args.rows:.2f} ms a step of both, {took / args.rows / floor:.1f} floors"
    )
    parts: dict[str, float] = {}

    def timed(name: str, work: Any) -> Any:
        def run_it(*given: Any) -> Any:
            found: list[Any] = []
            parts[name] = clock(lambda: found.append(work(*given)))
            return found[0]

        return run_it

    batch = generation._Batch
    with (
        patch.object(batch, "__init__", timed("writing", batch.__init__)),
        patch.object(batch, "table", timed("columns and table", batch.table)),
        patch.object(generation, "_noise_floor", timed("noise floor", generation._noise_floor)),
    ):
        generation.generation_rows(models[0], models[1], prompts, max_new_tokens=args.rows, **how)
    say("  of which " + ", ".join(f"{name} {ms:.0f} ms" for name, ms in parts.items()))


# --- experts -----------------------------------------------------------------------------------------------------------


def chosen_of(loaded: LoadedModel, prompts: list[list[int]], steps: int) -> float:
    """How many experts of a block some text chooses in a step; the mean over steps and blocks, counted in `generate()`."""
    counts: list[int] = []
    ids, mask = generating._left_padded(prompts, 0, loaded.device)

    def count(module: Any, given: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        index = next(x for x in (*given, *kwargs.values()) if not x.is_floating_point())
        if len(index) == len(prompts):  # not a prompt
            counts.append(index.unique().numel())

    handles = [m.register_forward_pre_hook(count, with_kwargs=True) for m in stacked_experts(loaded.model)]
    generating._write_plain(loaded, ids, mask, steps, Sampling(), torch.zeros(len(prompts), steps), [], 0, False)
    for handle in handles:
        handle.remove()
    return mean(counts)


def run_experts(args: Namespace, device: torch.device, rates: Any) -> None:
    from transformers.integrations.moe import grouped_mm_experts_forward

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape = MOE[args.family] | ({"hidden_size": 64, "head_dim": 8, "num_attention_heads": 8, "vocab_size": 512, "intermediate_size": 48, "num_hidden_layers": 2} if args.small else {})  # fmt: skip
    if args.small and args.family == "moe":
        shape |= {"moe_intermediate_size": 16, "num_experts": 16, "num_experts_per_tok": 2}
    loaded = build(0, shape, device, dtype, args.family)
    experts = stacked_experts(loaded.model)
    held = sum(p.numel() * p.element_size() for m in experts for p in m.parameters())
    table = loaded.model.get_input_embeddings().weight
    rest = sum(p.numel() * p.element_size() for p in loaded.model.parameters()) - held - table.numel() * table.element_size()  # fmt: skip
    say(f"{args.family}: {held / 1e9:.2f} GB of {experts[0].num_experts} experts in {len(experts)} blocks, {rest / 1e9:.2f} GB of other weights; {rates.bytes_per_s / 1e9:.0f} GB/s; {decoding_way(loaded)}")  # fmt: skip
    generator, clock, plain = torch.Generator().manual_seed(7), Clock(device), capturing._experts
    for batch in dict.fromkeys((args.batch, min(args.batch, 8), 1)):
        prompts = [torch.randint(shape["vocab_size"], (args.length - i % 8,), generator=generator).tolist() for i in range(batch)]  # fmt: skip
        hit = chosen_of(loaded, prompts, 8)
        floor = 1000 * (rest + held * hit / experts[0].num_experts) / rates.bytes_per_s
        say(f"{batch} texts: {hit:.1f} experts of a block are chosen in a step; floor {floor:.2f} ms a step")
        check_large(loaded, prompts, min(args.steps, 16))
        ways = {
            "as it is": plain,
            "all": capturing.all_experts,
            "by a kernel": capturing.grouped_experts,
            "grouped_mm": grouped_mm_experts_forward,
        }
        if batch == 1:
            ways["chosen"] = capturing.chosen_experts
        for name, way in ways.items():
            capturing._experts = way
            try:
                found, before = step_ms([loaded], prompts, args.steps, args.rounds, clock)
                middle = median(found)
                say(f"  graph, experts {name}: {middle:.2f} ms a step ({min(found):.2f} .. {max(found):.2f}), {middle / floor:.2f} floors; prompts and the first 4 steps {before:.0f} ms")  # fmt: skip
            except Exception as error:  # a GPU or a dtype without that kernel
                say(f"  graph, experts {name}: {type(error).__name__}: {first_line(error)}")
            finally:
                capturing._experts = plain
        if args.profile and device.type == "cuda":
            profile_step(loaded, prompts)
        ids, mask = generating._left_padded(prompts, 0, device)
        took = []
        for count in (4, 4, 20):
            how = (ids, mask, count, Sampling(), torch.zeros(batch, count), [], 0, True)
            took.append(clock(lambda how=how: generating._write_plain(loaded, *how)))
        each = (took[2] - took[1]) / 16
        say(f"  generate(): {each:.2f} ms a step, {each / floor:.2f} floors")


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--rows", type=int, default=0, help="steps of generate() with all columns; 0 leaves it out")
    parser.add_argument(
        "--without", default="fusing", help="time a step without each of these too: " + ", ".join(REPLACED)
    )
    parser.add_argument("--family", choices=sorted(CLASSES), default="qwen2")
    parser.add_argument("--skip-families", action="store_true")
    run(parser.parse_args())


def run(args: Namespace) -> None:
    device = torch.device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    say(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}")
    if not args.skip_families:
        check_families(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rates = measure_rates(device, dtype)
    if args.family in MOE:
        return run_experts(args, device, rates)
    shape = SMALL if args.small else SHAPE
    models = [build(seed, shape, device, dtype) for seed in (0, 1)]
    generator = torch.Generator().manual_seed(7)
    lengths = [args.length - i % 8 for i in range(args.batch)]
    prompts = [torch.randint(shape["vocab_size"], (n,), generator=generator).tolist() for n in lengths]
    weights = sum(p.numel() * p.element_size() for p in models[0].model.parameters())
    floor = 1000 * len(models) * weights / rates.bytes_per_s
    say(
        f"{len(models)} models of {weights / 1e9:.2f} GB; {rates.bytes_per_s / 1e9:.0f} GB/s, {rates.operations_per_s / 1e12:.0f} TFLOP/s measured"
    )
    check_large(models[0], prompts, min(args.steps, 32))
    clock = Clock(device)
    ways: dict[str, list[tuple[float, float]]] = {"": [], **{name: [] for name in args.without.split(",") if name}}
    for _ in range(args.rounds + 1):  # side by side, as a device's clock may drift
        for name, rows in ways.items():
            with ExitStack() as stack:
                for place, attribute, other in REPLACED.get(name, []):
                    stack.enter_context(patch.object(place, attribute, other))
                rows.append(one_round(models, prompts, args.steps, clock))
    for name, rows in ways.items():
        found = [each for each, _ in rows[1:]]
        middle, before = median(found), median(before for _, before in rows[1:])
        say(f"a step of both models, batch {args.batch}{', without ' + name if name else ''}: {middle:.2f} ms ({min(found):.2f} .. {max(found):.2f}); "
            f"floor {floor:.2f} ms, ratio {middle / floor:.2f}; prompts of {args.length} tokens, set-up and the first 4 steps: {before:.0f} ms")  # fmt: skip
    if args.profile and device.type == "cuda":
        profile_step(models[0], prompts)
    plain = []
    ids, mask = generating._left_padded(prompts, 0, device)
    for count in (4, 20):
        how = (ids, mask, count, Sampling(), torch.zeros(len(prompts), count), [], 0, True)
        plain.append(clock(lambda how=how: [generating._write_plain(loaded, *how) for loaded in models]))
    say(f"generate(): {(plain[1] - plain[0]) / 16:.1f} ms a step of both")
    if args.rows:
        rows_ms(models, prompts, args, clock, floor)


if __name__ == "__main__":
    main()
