"""The command lines of the paper's public code (arXiv 2603.24652), flags unchanged, over prunescope's own commands.

The scripts in `paper/` are one call each of a function here. Every one writes an ordinary run folder or checkpoint, and prints and logs
the lines that the paper's code logs, under the same path and with the same labels. What a line means follows the paper's code in
that mode (docs/paper.md says where that differs from the paper, and where our numbers differ from that code). Not written: its lists
of the five likeliest tokens at every sublayer and the medians over the vocabulary.
"""

from __future__ import annotations

import json
import sys
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from prunescope import commands
from prunescope.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    Column = np.ndarray[Any, np.dtype[np.float64]]

__all__ = ["compare_generation", "compare_layers", "compare_options", "drop_layers", "prune_weights", "run"]

PROMPT = "A baker made three times as many rolls as cakes. Together there were 24 of them. How many cakes did the baker make?"
QUESTION = {
    "question": "Which of these animals feeds its young with milk?",
    "choices": ["Lizard", "Trout", "Rabbit", "Crow"],
    "answer": 2,
    "id": "animals",
}
TARGET_LAYERS = ("attn", "mlp", "all")
_RATIOS = ("para_perp(mean):   ", "para_perp(median): ", "ratio_of_means:    ")


def run(script: Callable[[Sequence[str] | None], None]) -> None:
    """Run a script: the user's mistake is one line and exit code 2, as in the prunescope command."""
    try:
        script(None)
    except UserError as error:
        print(f"prunescope: {error}", file=sys.stderr)
        sys.exit(2)


class _Flags(ArgumentParser):
    """Flags whose misuse is the user's mistake like any other: one line, no usage text."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


# --- representation-analysis -------------------------------------------------------------------------------------------


def compare_layers(argv: Sequence[str] | None) -> None:
    """transition_layerwise_compare.py: every dropped sublayer (or every sublayer of a pruned model) in the same context."""
    args = _writing_flags("Compare sublayers in the same context.", drop_n=0).parse_args(argv)
    target, lists, note = _target(args, needed=False)
    log = _Log(args, f"layerwise_{args.analysis_mode}/temp{args.temperature}", "log-cosine.txt")
    with _prompts(args) as prompts:
        found = commands.layerwise(
            args.model_name, target, out=str(log.run_folder), prompts=prompts, overwrite=True, **_sampling(args)
        )
    log(f"=== Layerwise Sublayer Metrics Log ({args.analysis_mode}) ===")
    for sample in found._samples:
        log(_prompt_line(args, sample), *note, "--- Dense Model Output ---", f"{sample['dense']}\n")
        rows = _rows_of(found.table(), sample["prompt"], lists)
        log.write(transition_lines(rows, dropped=args.analysis_mode == "dropped"))


def compare_generation(argv: Sequence[str] | None) -> None:
    """compare_generation_metrics.py: both models write, and are compared step by step."""
    args = _writing_flags("Compare two models while they write.", drop_n=8).parse_args(argv)
    target, _, note = _target(args)
    log = _Log(
        args, f"{args.target_layer}/temp{args.temperature}", f"log_{args.analysis_mode}_drop{args.drop_n}-final.txt"
    )
    with _prompts(args) as prompts:
        found = commands.generate(
            args.model_name, str(target), out=str(log.run_folder), prompts=prompts, overwrite=True, **_sampling(args)
        )
    log(f"=== Final Comparison Log ({args.analysis_mode}) ===")
    name = args.analysis_mode
    for sample in found.samples():
        log(_prompt_line(args, sample), "--- Dense Model Output ---", f"{sample['dense']}\n", *note)
        log(f"--- {name.capitalize()} Model Output ---", f"{sample['target']}\n")
        log(*generation_lines(found.table(), sample["prompt"], name, _metric_temperature(args)), "=" * 80)


def compare_options(argv: Sequence[str] | None) -> None:
    """compare_mcq_subspace_metrics.py: the whole vocabulary against the answer options."""
    parser = _analysis_flags("Compare the vocabulary with the answer options.", drop_n=8)
    parser.add_argument("--mode", default="default", help="tag in the name of the log file")
    parser.add_argument("--questions", help="JSONL of questions (ours); left out, one built-in question")
    args = parser.parse_args(argv)
    target, _, note = _target(args)
    log = _Log(
        args,
        f"{args.target_layer}_{args.analysis_mode}_temp{args.temperature}",
        f"log_drop{args.drop_n}-{args.mode}-subspace.txt",
    )
    temperature = _metric_temperature(args)
    with _jsonl([QUESTION]) as built_in:
        found = commands.mcq(
            args.model_name, str(target), out=str(log.run_folder), questions=args.questions or built_in, template="paper",
            metric_temperature=temperature, seed=args.seed, overwrite=True,
        )  # fmt: skip
    log("=== Drop Experiment Log ===")
    rows = {(row["question"], row["space"]): row for row in found.table().to_pylist()}
    for sample in found.samples():
        log(sample["text"], *(note or ["compare_mode: pruned"]))
        whole, options = (rows[sample["question"], space] for space in ("global", "options"))
        log(*option_lines(sample, whole, options, temperature))


def _analysis_flags(description: str, drop_n: int) -> ArgumentParser:
    parser = _Flags(description=description)
    parser.add_argument("--analysis_mode", default="dropped", choices=["dropped", "pruned"])
    parser.add_argument(
        "--model_root_path", help="folder of models; used with --model_postfix where --model_name is not given"
    )
    parser.add_argument("--model_postfix", help="model under the root, and tag in the names of dropped folders")
    parser.add_argument("--model_name", help="dense model: Hugging Face id, folder, .gguf file or smollm2-135m")
    parser.add_argument("--model_tag", help="tag in the names of dropped folders; left out, the model's name")
    parser.add_argument("--pruned_model_name", help="target of --analysis_mode pruned")
    parser.add_argument("--dropped_root_path", help="folder that paper/inter-layer wrote; for --analysis_mode dropped")
    parser.add_argument("--target_layer", default="attn", choices=TARGET_LAYERS)
    parser.add_argument("--drop_n", type=int, default=drop_n)
    parser.add_argument("--max_length", type=int, default=512, help="new tokens at most")
    parser.add_argument(
        "--temperature", type=float, default=0.5, help="of sampling, and T of the metrics; 0 is greedy with T = 1"
    )
    parser.add_argument("--top_k", type=int, default=0)
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument(
        "--verbose", action="store_true", help="taken for the paper's sake; everything is printed anyway"
    )
    parser.add_argument("--log_dir", default="cosine_logs", help="where logs and run folders go (ours)")
    parser.add_argument("--seed", type=int, default=42)
    return parser


def _writing_flags(description: str, drop_n: int) -> ArgumentParser:
    """The flags of the two scripts in which a model writes."""
    parser = _analysis_flags(description, drop_n)
    parser.add_argument("--prompt_idx", type=int, help="only this prompt")
    parser.add_argument("--prompts", help="file of prompts (ours); left out, one built-in prompt")
    parser.add_argument(
        "--stop_at_eos", action="store_true", help="end a text at its end token (ours; the paper's code writes on)"
    )
    return parser


def _metric_temperature(args: Namespace) -> float:
    return float(args.temperature) if args.temperature > 0 else 1.0


def _sampling(args: Namespace) -> dict[str, Any]:
    return {
        "max_new_tokens": args.max_length,
        "temperature": args.temperature,
        "metric_temperature": _metric_temperature(args),
        "top_k": args.top_k,
        "top_p": args.top_p,
        "seed": args.seed,
        "ignore_eos": not args.stop_at_eos,
    }


class _Log:
    """The log file of a script and the run folder beside it. Calling it prints lines and appends them."""

    def __init__(self, args: Namespace, folder: str, name: str) -> None:
        self.folder = Path(args.log_dir) / folder
        self.path = self.folder / name
        self.run_folder = self.folder / self.path.stem.replace("log-cosine", "run").replace("log_", "run_")
        self._begun = False

    def __call__(self, *lines: str) -> None:
        self.write(lines)

    def write(self, lines: Iterable[str]) -> None:
        """Many lines, one after the other."""
        with self.path.open("a" if self._begun else "w", encoding="utf-8") as file:
            self._begun = True
            for line in lines:
                file.write(f"{line}\n")
                sys.stdout.write(f"{line}\n")


@contextmanager
def _prompts(args: Namespace) -> Iterator[str]:
    """The prompts that the flags choose, as a file for the length of a ``with`` block."""
    from prunescope.data.prompts import Prompt, read_prompts

    chosen = [Prompt(PROMPT, "arithmetic")] if args.prompts is None else read_prompts(args.prompts)
    if args.prompt_idx is not None:
        if not 0 <= args.prompt_idx < len(chosen):
            raise UserError(f"--prompt_idx {args.prompt_idx}: there are prompts 0 to {len(chosen) - 1}")
        chosen = chosen[args.prompt_idx : args.prompt_idx + 1]
    with _jsonl([{"prompt": prompt.text, "id": prompt.id, "kind": prompt.kind} for prompt in chosen]) as path:
        # the user's own file stands in the run's config, so that it can be run again
        yield path if args.prompts is None or args.prompt_idx is not None else args.prompts


@contextmanager
def _jsonl(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    """A JSONL file for the length of a ``with`` block."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="prunescope-") as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
        yield str(path)


def _prompt_line(args: Namespace, sample: dict[str, Any]) -> str:
    """The head of a prompt, under its number in the whole file."""
    return f"\n=== Prompt {sample['prompt'] + 1 + (args.prompt_idx or 0)} ===\n{sample['text']}\n"


def _rows_of(table: pa.Table, prompt: int, lists: dict[str, list[int]] | None) -> pa.Table:
    """The rows of one prompt; with ``lists``, those of the sublayers named there only."""
    import pyarrow as pa
    import pyarrow.compute as pc

    wanted = pc.equal(table["prompt"], prompt)
    if lists is not None:
        named = [
            pc.and_(pc.equal(table["sublayer"], kind), pc.is_in(table["layer"], pa.array(layers, pa.int32())))
            for kind, layers in lists.items()
        ]
        wanted = pc.and_(wanted, pc.or_(*named))
    return table.filter(wanted)


# --- the dropped folders of the paper's code ---------------------------------------------------------------------------


def checkpoint_folder(
    root: str | Path, tag: str, target_layer: str, drop_n: int, *, order: str = "discrete", method: str | None = None
) -> Path:
    """Where the paper's code keeps what it dropped: attention or MLP sublayers, or (``all``) whole blocks.

    Args:
        root, tag: the folder's name begins with the tag, an absolute path too: it stays under the root.
        order: discrete is what the analysis scripts look for.
        method: layer_drop or block_drop; by default block_drop for ``all``, as the analysis scripts take it.
    """
    if method == "block_drop" or (method is None and target_layer == "all"):
        return Path(f"{root}/block_drop/{tag}-block_drop-all-{order}-drop{drop_n}/checkpoint")
    return Path(f"{root}/{tag}-layer_drop_{target_layer}-{order}-drop{drop_n}/checkpoint")


def _target(args: Namespace, needed: bool = True) -> tuple[str | None, dict[str, list[int]] | None, list[str]]:
    """TARGET of our commands, what it drops (None: not known, or everything in turn), and the log line that says so.

    Sets ``args.model_name``.
    """
    if args.model_name is None:
        if args.model_postfix is None:
            raise UserError("no model: give --model_name (an id, a folder, a .gguf file or smollm2-135m)")
        root = args.model_root_path
        args.model_name = args.model_postfix if root is None else str(Path(root) / args.model_postfix)
    if args.analysis_mode == "pruned":
        if not args.pruned_model_name:
            raise UserError("--analysis_mode pruned compares with a pruned model: give --pruned_model_name")
        return args.pruned_model_name, None, []
    if args.drop_n == 0 and not needed:
        return None, None, ["drop_attn_list: [] | drop_mlp_list: [] (every sublayer dropped in turn)"]
    if args.drop_n < 1:
        raise UserError(
            f"--drop_n {args.drop_n}: nothing is dropped, so that there is nothing to compare; give 1 or more"
        )
    if not args.dropped_root_path:
        raise UserError("--analysis_mode dropped needs --dropped_root_path, the folder that paper/inter-layer wrote")
    lists = read_drop_lists(args)
    spec = ";".join(f"{kind}={','.join(map(str, layers))}" for kind, layers in lists.items() if layers)
    return f"drop:{spec}", lists, [f"drop_attn_list: {lists['attn']} | drop_mlp_list: {lists['mlp']}"]


def read_drop_lists(args: Namespace) -> dict[str, list[int]]:
    """The lists in the folder that the flags name: the first that exists of the tags that the model may have there.

    Raises:
        UserError: there is no such folder, or its lists are not what was asked for.
    """
    from prunescope.models.record import layer_list, read_record

    name = args.model_name.rstrip("/")
    tags = [args.model_tag] if args.model_tag else [args.model_postfix or name, name, name.rpartition("/")[2]]
    folders = [
        checkpoint_folder(args.dropped_root_path, t, args.target_layer, args.drop_n) for t in dict.fromkeys(tags)
    ]
    path = next((folder / "config.json" for folder in folders if (folder / "config.json").is_file()), None)
    if path is None:
        raise UserError(
            f"no dropped model: looked for {' and '.join(str(folder / 'config.json') for folder in folders)}; make it with paper/inter-layer/compress.py, or give --model_tag"
        )
    keys = {kind: f"drop_{kind}_list" for kind in ("attn", "mlp")}
    try:
        # zeroed weights load as an ordinary model: what is silent in them stands in our record, not in config.json
        config = (read_record(path.parent) or {}) | json.loads(path.read_text("utf-8"))
        lists = {kind: list(layer_list(f"{path}: {key}", config.get(key))) for kind, key in keys.items()}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); drop again") from error
    for kind, layers in lists.items():
        wanted = args.drop_n if args.target_layer in (kind, "all") else 0
        if len(layers) != wanted:
            raise UserError(
                f"{path} drops {len(layers)} {kind} sublayers {layers}, but --target_layer {args.target_layer} --drop_n {args.drop_n} asks for {wanted}; give the flags it was made with"
            )
    return lists


# --- log lines ---------------------------------------------------------------------------------------------------------


def against_target(alpha: Column, orth: Column) -> tuple[Column, Column]:
    """alpha and the orthogonal part of the way back, dense - target, relative to the target's vector; ``(rows,)`` each.

    With X dense, Y target, and everything relative to the dense vector: a = <Y, X>/|X|^2 = 1 + alpha, o = |Y across X|/|X| and |Y|^2/|X|^2
    = a^2 + o^2. So <X - Y, Y>/|Y|^2 = -(a alpha + o^2) / (a^2 + o^2), and |X across Y|/|Y| = o / (a^2 + o^2). NaN where Y is zero.
    """
    import numpy as np

    a, o2 = 1 + alpha, orth * orth
    length2 = a * a + o2
    with np.errstate(divide="ignore", invalid="ignore"):
        return -(a * alpha + o2) / length2, orth / length2


def transition_lines(rows: pa.Table, dropped: bool) -> Iterator[str]:
    """The lines of sublayers at steps, in the order of ``rows``. In dropped mode the paper's code takes the dropped side as the base.

    The mean, the median and the ratio of means of the parallel over the orthogonal part are one number, for a row is one place.
    """
    import numpy as np

    def column(name: str) -> Column:
        return rows[name].to_numpy()  # type: ignore[no-any-return]

    side = "" if dropped else "_target"
    columns = [
        ("emb sim:         ", 4, column("h_cos")),
        ("head sim:        ", 4, column("z_cos")),
        ("vocab sim:       ", 4, column("p_cos")),
        ("REAL_KL:         ", 6, column("kl_dense_target" if dropped else "kl_target_dense")),
        ("KL_estimate:     ", 6, column(f"kl_est{side}")),
        ("REAL(1-cos):     ", 6, column("p_cos_dev")),
        ("1-cos_estimate:  ", 6, column(f"p_cos_dev_est{side}")),
        ("Uniform_Var:     ", 6, column("var_uniform")),
    ]
    for space in "zh":
        alpha, orth = column(f"{space}_alpha"), column(f"{space}_orth_rel")
        alpha, orth = against_target(alpha, orth) if dropped else (alpha, orth)
        para = np.abs(alpha)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = para / orth
        capital = space.upper()
        columns += [
            (f"{capital}_real(1-cos):   ", 6, column(f"{space}_cos_dev")),
            (f"{capital}_para_rel:      ", 6, para),
            (f"{capital}_orth_rel:      ", 6, orth),
            *((f"{capital}_{name}", 6, ratio) for name in _RATIOS),
            (f"alpha_{space}_mean:    ", 6, alpha),
        ]
    formats = [f"{name}{{:.{decimals}f}}".format for name, decimals, _ in columns]
    values = zip(*(values.tolist() for _, _, values in columns), strict=True)
    places = zip(*(rows[name].to_pylist() for name in ("layer", "sublayer", "step")), strict=True)
    for (layer, kind, step), row in zip(places, values, strict=True):
        label = f"{layer} {'dropped_' if dropped else ''}{kind}_step{step} "
        yield from (label + line(value) for line, value in zip(formats, row, strict=True))
        yield from ("", "")


def generation_lines(table: pa.Table, prompt: int, name: str, temperature: float) -> list[str]:
    """The lists of one prompt over its free-running steps, scaled as the paper's code scales them."""
    import pyarrow.compute as pc

    rows = table.filter(pc.and_(pc.equal(table["prompt"], prompt), pc.equal(table["regime"], "free-running")))

    def column(key: str) -> Column:
        return rows[key].to_numpy()  # type: ignore[no-any-return]

    half = 2 * temperature * temperature
    logits = {
        "global_l1": column("dz_l1"),
        "global_l2": column("dz_rms"),
        "top5_l1": 5 * column("dz_top5_l1"),  # a sum over the five tokens there, a mean here
        "top5_l2": column("dz_top5_rms"),
    }
    estimates = {
        "kl_estimates": column("kl_est"),
        "cos_estimates": column("p_cos_dev_est"),
        "uniform_var": column("var_uniform") / half,
        "top5_var": column("var_top5") / half,
        "top10_var": column("var_top10") / half,
    }
    return [
        f"=== Cosine Similarity (dense vs {name}) ===",
        *(
            f"{key}_cos_sim_flat: {column(f'{space}_cos').tolist()}"
            for key, space in (("emb", "h"), ("logits", "z"), ("prob", "p"))
        ),
        f"=== KL Divergence (dense vs {name}) ===",
        f"kl_divergence_flat: {column('kl_dense_target').tolist()}",
        f"analysis_temperature: {temperature}",
        *(f"{key}: {values.tolist()}" for key, values in estimates.items()),
        # over the vocabulary there is a list of one prompt a step
        *(
            f"{key}: {(values[:, None] if key.startswith('global') else values).tolist()}"
            for key, values in logits.items()
        ),
        *(f"summary_{key}_mean: {values.mean():.6f}" for key, values in logits.items()),
    ]


def option_lines(
    sample: dict[str, Any], whole: dict[str, Any], options: dict[str, Any], temperature: float
) -> list[str]:
    """The blocks of one question, all at the metric temperature. KL is a sum over tokens: the paper's code divides it by their number."""
    letters = "/".join(text.strip() for text in sample["option_strings"])
    tops = [(repr(token["text"]), token["p_dense"], token["p_target"]) for token in sample["top_dense"]]
    both = zip(
        sample["option_strings"],
        _log_probabilities(sample, whole, "dense", temperature),
        _log_probabilities(sample, whole, "target", temperature),
        strict=True,
    )
    return [
        f"Subspace token ids: {sample['option_tokens']}",
        "\n===== GLOBAL =====",
        *_space_lines("Global", whole),
        "\n===== TOP TOKENS (Original vs Dropped) =====",
        *(f"{token:<15} | orig={p:.6f} | drop={q:.6f}" for token, p, q in tops),
        f"\n===== TOP TOKENS {[token for token, _, _ in tops]} =====",
        f"\n===== SUBSPACE ({letters}) =====",
        *_space_lines("Subspace", options),
        "=" * 80,
        "\n===== SUBWORD PROBABILITIES (Original vs Dropped) =====",
        *(f"{text:<10} | orig={p:.6f} | drop={q:.6f}" for text, p, q in both),
    ]


def _space_lines(name: str, row: dict[str, Any]) -> list[str]:
    numbers = {"logits cosine": row["z_cos"], "prob cosine": row["p_cos"], "KL": row["kl_dense_target"]}
    return [f"{name} {what}: [{value}]" for what, value in numbers.items()]


def _log_probabilities(sample: dict[str, Any], whole: dict[str, Any], side: str, temperature: float) -> list[float]:
    """log p of each option's token at the metric temperature T, in nats.

    The table holds them at T = 1, and at T that of the right option (``nll``); two options are 1/T as far apart at T as at 1. Where
    options are not one token each (``option_tokens`` is null) they are sequence log-likelihoods, which know T = 1 only.
    """
    found: list[float] = whole[f"loglik_{side}"]
    if temperature == 1 or sample["option_tokens"] is None:
        return found
    right = found[whole["gold"]]
    return [(value - right) / temperature - whole[f"nll_{side}"] for value in found]


# --- inter-layer and intra-layer ---------------------------------------------------------------------------------------

_IGNORED = (  # flags of LLM-Drop's trainer, data loader and launcher that decide nothing here
    *("--stage", "--dataset_dir", "--split", "--prune_data_type", "--template", "--streaming", "--mix_strategy"),
    *("--overwrite_cache", "--preprocessing_num_workers", "--cache_path", "--cache_dir", "--similarity_cache_file"),
    *("--use_fast_tokenizer", "--flash_attn", "--print_param_status", "--logging_steps", "--report_to", "--plot_loss"),
    *("--overwrite_output_dir", "--do_train", "--do_eval", "--deepspeed", "--local_rank", "--bf16", "--fp16", "--tf32"),
    *("--per_device_train_batch_size", "--per_device_eval_batch_size"),
)


def drop_layers(argv: Sequence[str] | None) -> None:
    """inter-layer/compress.py: LLM-Drop's flags; writes the checkpoint where the analysis scripts look for it."""
    parser = _Flags(description="Drop attention or MLP sublayers, or whole blocks, as LLM-Drop does.")
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--prune_method", default="layer_drop", choices=["layer_drop", "block_drop"])
    for flag in ("--layer_drop_method", "--block_drop_method"):
        parser.add_argument(flag, default="discrete", choices=["discrete", "consecutive", "post_dropping"])
    parser.add_argument("--target_layer", default="attn", choices=TARGET_LAYERS)
    parser.add_argument("--drop_n", type=int, required=True)
    parser.add_argument("--dataset", default="c4_val", help="c4_val, or a text, JSON or JSONL file, or self (ours)")
    parser.add_argument("--n_calibration_samples", type=int, default=256)
    parser.add_argument("--cutoff_len", type=int, default=2048)
    parser.add_argument(
        "--layer_drop_norm",
        nargs="?",
        const="True",
        default="True",
        help="True: score with the module's norm, as LLM-Drop does",
    )
    parser.add_argument(
        "--only_update_config",
        nargs="?",
        const="True",
        default="True",
        help="True: drop lists only; False: weights too, dropped branches zero",
    )
    parser.add_argument("--output_dir", help="the checkpoint goes to its subfolder checkpoint")
    parser.add_argument("--prune_model_save_path", help="folder of the checkpoint")
    parser.add_argument("--dropped_root_path", help="root of the paper's folder layout (ours)")
    parser.add_argument(
        "--model_tag", help="tag in the folder's name (ours); left out, the last part of the model's name"
    )
    parser.add_argument("--seed", "--prune_seed", type=int, default=0, help="of the calibration's choice")
    parser.add_argument("--model_revision", help="revision of a Hugging Face id")
    for flag in _IGNORED:
        parser.add_argument(flag, nargs="?", default=SUPPRESS, help=SUPPRESS)
    args = parser.parse_args(argv)
    block = args.prune_method == "block_drop"
    order = args.block_drop_method if block else args.layer_drop_method
    if order == "post_dropping":
        raise UserError(f"post_dropping is not needed: --only_update_config False writes the weights in the same run as {'block' if block else 'layer'}_drop_method discrete")  # fmt: skip
    out = _checkpoint_path(args, order)
    ignored = [flag for flag in _IGNORED if hasattr(args, flag.removeprefix("--"))]
    if ignored:
        print(f"ignored, since they decide nothing here: {', '.join(ignored)}")
    commands.drop(
        args.model_name_or_path,
        target="block" if block else args.target_layer,
        n=args.drop_n,
        out=str(out),
        format="recipe" if _is_true("--only_update_config", args.only_update_config) else "zeroed",
        order=order,
        score_on="norm" if _is_true("--layer_drop_norm", args.layer_drop_norm) and not block else "stream",
        calibration={"c4_val": "c4"}.get(args.dataset, args.dataset),
        samples=args.n_calibration_samples,
        seq_len=args.cutoff_len,
        seed=args.seed,
        revision=args.model_revision,
        overwrite=True,
    )


def _checkpoint_path(args: Namespace, order: str) -> Path:
    """Where the checkpoint goes: the paper's layout if its root is given, else as LLM-Drop's own flags say."""
    if args.dropped_root_path:
        tag = args.model_tag or args.model_name_or_path.rstrip("/").rpartition("/")[2]
        return checkpoint_folder(
            args.dropped_root_path, tag, args.target_layer, args.drop_n, order=order, method=args.prune_method
        )
    if args.prune_model_save_path:
        return Path(args.prune_model_save_path)
    if args.output_dir:
        return Path(args.output_dir) / "checkpoint"
    raise UserError("no place for the checkpoint: give --dropped_root_path, --output_dir or --prune_model_save_path")


def _is_true(flag: str, value: str) -> bool:
    if value.lower() not in ("true", "false"):
        raise UserError(f"{flag} {value}: give True or False")
    return value.lower() == "true"


def prune_weights(argv: Sequence[str] | None) -> None:
    """intra-layer/main.py: weight pruning with the flags of the Wanda code."""
    parser = _Flags(description="Prune weights: magnitude, Wanda, SparseGPT, or whole MLP neurons.")
    parser.add_argument("--model", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--sparsity_ratio", type=float, default=0.0)
    parser.add_argument("--sparsity_type", required=True, choices=["unstructured", "4:8", "2:4", "structured"])
    parser.add_argument(
        "--prune_method", required=True, choices=["magnitude", "wanda", "sparsegpt", "neuron_partition"]
    )
    parser.add_argument("--use_variant", action="store_true", help="Wanda's variant with a searched threshold")
    parser.add_argument("--save", help="folder of the log file")
    parser.add_argument("--save_model", help="folder of the checkpoint")
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--cache_dir", help=SUPPRESS)
    parser.add_argument("--eval_zero_shot", action="store_true", help=SUPPRESS)
    parser.add_argument("--calibration", default="c4", help="text, JSON or JSONL file, or a data set id (ours)")
    parser.add_argument("--perplexity", help="text file to measure perplexity on (ours)")
    args = parser.parse_args(argv)
    structured = args.prune_method == "neuron_partition"
    if args.eval_zero_shot:
        raise UserError("--eval_zero_shot: run lm-evaluation-harness on the folder of --save_model instead")
    if not args.save_model:
        raise UserError("no place for the pruned model: give --save_model")
    if structured != (args.sparsity_type == "structured"):
        raise UserError(f"--prune_method {args.prune_method} does not go with --sparsity_type {args.sparsity_type}")
    pattern = args.sparsity_type if ":" in args.sparsity_type else None
    if pattern and args.sparsity_ratio != 0.5:
        raise UserError(f"--sparsity_ratio {args.sparsity_ratio:g}: {pattern} removes half of the weights; give 0.5")
    found = commands.sparsify(
        args.model,
        method="structured" if structured else args.prune_method,
        sparsity=None if pattern else args.sparsity_ratio,
        pattern=pattern,
        out=args.save_model,
        variant=args.use_variant,
        calibration="none" if args.prune_method == "magnitude" else args.calibration,
        samples=args.nsamples,
        seq_len=args.seqlen,
        seed=args.seed,
        perplexity=args.perplexity,
        overwrite=True,
    )
    measured = found.summary["perplexity"]
    print(f"sparsity sanity check {found.summary['sparsity']:.4f}")
    if measured:
        print(f"wikitext perplexity {measured['pruned']}")
    if args.save:
        Path(args.save).mkdir(parents=True, exist_ok=True)
        perplexity = f"{measured['pruned']:.4f}" if measured else "-"
        text = (
            f"method\tactual_sparsity\tppl_test\n{args.prune_method}\t{found.summary['sparsity']:.4f}\t{perplexity}\n"
        )
        (Path(args.save) / f"log_{args.prune_method}.txt").write_text(text, "utf-8")
