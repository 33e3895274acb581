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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunescope import commands
from prunescope.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

__all__ = ["compare_generation", "compare_layers", "compare_options", "drop_layers", "prune_weights", "run"]

PROMPT = "A baker made three times as many rolls as cakes. Together there were 24 of them. How many cakes did the baker make?"
QUESTION = {
    "question": "Which of these animals feeds its young with milk?",
    "choices": ["Lizard", "Trout", "Rabbit", "Crow"],
    "answer": 2,
    "id": "animals",
}
TARGET_LAYERS = ("attn", "mlp", "all")


def run(script: Callable[[Sequence[str] | None], None]) -> None:
    """Run a script: the user's mistake is one line and exit code 2, as in the prunescope command."""
    try:
        script(None)
    except UserError as error:
        print(f"prunescope: {error}", file=sys.stderr)
        sys.exit(2)


# --- representation-analysis -------------------------------------------------------------------------------------------


def compare_layers(argv: Sequence[str] | None) -> None:
    """transition_layerwise_compare.py: every dropped sublayer (or every sublayer of a pruned model) in the same context."""
    args = _analysis_flags("Compare sublayers in the same context.", drop_n=0).parse_args(argv)
    target, lists = _target(args, needed=False)
    log = _Log(args, f"layerwise_{args.analysis_mode}/temp{args.temperature}", "log-cosine.txt")
    with log.prompts(args) as prompts:
        found = commands.layerwise(
            args.model_name, target, out=str(log.run_folder), prompts=prompts, overwrite=True, **_sampling(args)
        )
    log(f"=== Layerwise Sublayer Metrics Log ({args.analysis_mode}) ===", *lists)
    changed = {(kind, layer) for kind, layers in found.info["changed_layers"].items() for layer in layers}
    for sample in found._samples:
        log(
            f"\n=== Prompt {sample['prompt'] + 1} ===\n{sample['text']}\n",
            "--- Dense Model Output ---",
            f"{sample['dense']}\n",
        )
    dropped = args.analysis_mode == "dropped"
    for row in found.table().to_pylist():
        if not dropped or target is None or (row["sublayer"], row["layer"]) in changed:
            label = f"{'dropped_' if dropped else ''}{row['sublayer']}_step{row['step']}"
            log(*transition_lines(row, label, dropped), "", "")


def compare_generation(argv: Sequence[str] | None) -> None:
    """compare_generation_metrics.py: both models write, and are compared step by step."""
    args = _analysis_flags("Compare two models while they write.", drop_n=8).parse_args(argv)
    target, lists = _target(args)
    log = _Log(
        args, f"{args.target_layer}/temp{args.temperature}", f"log_{args.analysis_mode}_drop{args.drop_n}-final.txt"
    )
    with log.prompts(args) as prompts:
        found = commands.generate(
            args.model_name, str(target), out=str(log.run_folder), prompts=prompts, overwrite=True, **_sampling(args)
        )  # fmt: skip
    log(f"=== Final Comparison Log ({args.analysis_mode}) ===", *lists)
    name = "dropped" if args.analysis_mode == "dropped" else "pruned"
    for sample in found.samples():
        log(
            f"\n=== Prompt {sample['prompt'] + 1} ===\n{sample['text']}\n",
            "--- Dense Model Output ---",
            f"{sample['dense']}\n",
        )
        log(f"--- {name.capitalize()} Model Output ---", f"{sample['target']}\n")
        log(*generation_lines(found.table(), sample["prompt"], name, _metric_temperature(args)), "=" * 80)


def compare_options(argv: Sequence[str] | None) -> None:
    """compare_mcq_subspace_metrics.py: the whole vocabulary against the answer options."""
    parser = _analysis_flags("Compare the vocabulary with the answer options.", drop_n=8)
    parser.add_argument("--mode", default="default", help="tag in the name of the log file")
    parser.add_argument("--questions", help="JSONL of questions (ours); left out, one built-in question")
    args = parser.parse_args(argv)
    target, lists = _target(args)
    log = _Log(
        args,
        f"{args.target_layer}_{args.analysis_mode}_temp{args.temperature}",
        f"log_drop{args.drop_n}-{args.mode}-subspace.txt",
    )
    with log.written("questions.jsonl", None if args.questions else json.dumps(QUESTION)) as built_in:
        found = commands.mcq(
            args.model_name, str(target), out=str(log.run_folder), questions=args.questions or built_in, template="paper",
            metric_temperature=_metric_temperature(args), seed=args.seed, overwrite=True,
        )  # fmt: skip
    log("=== Drop Experiment Log ===", *lists)
    rows = found.table().to_pylist()
    for number, sample in enumerate(found.samples()):
        log(*option_lines(sample, rows[2 * number], rows[2 * number + 1]))


def _analysis_flags(description: str, drop_n: int) -> ArgumentParser:
    parser = ArgumentParser(description=description)
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
    parser.add_argument("--prompt_idx", type=int, help="only this prompt")
    parser.add_argument(
        "--verbose", action="store_true", help="taken for the paper's sake; everything is printed anyway"
    )
    parser.add_argument("--prompts", help="file of prompts (ours); left out, one built-in prompt")
    parser.add_argument("--log_dir", default="cosine_logs", help="where logs and run folders go (ours)")
    parser.add_argument(
        "--stop_at_eos", action="store_true", help="end a text at its end token (ours; the paper's code writes on)"
    )
    parser.add_argument("--seed", type=int, default=42)
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
        self._lines: list[str] = []

    def __call__(self, *lines: str) -> None:
        with self.path.open("a" if self._lines else "w", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines))
        self._lines.extend(lines)
        print(*lines, sep="\n")

    def prompts(self, args: Namespace) -> Any:
        """The prompts that the flags choose, as a file for the length of a ``with`` block."""
        from prunescope.data.prompts import Prompt, read_prompts

        chosen = [Prompt(PROMPT, "arithmetic")] if args.prompts is None else read_prompts(args.prompts)
        if args.prompt_idx is not None:
            if not 0 <= args.prompt_idx < len(chosen):
                raise UserError(f"--prompt_idx {args.prompt_idx}: there are prompts 0 to {len(chosen) - 1}")
            chosen = chosen[args.prompt_idx : args.prompt_idx + 1]
        lines = [json.dumps({"prompt": prompt.text, "id": prompt.id, "kind": prompt.kind}) for prompt in chosen]
        return self.written("prompts.jsonl", "\n".join(lines))

    def written(self, name: str, text: str | None) -> Any:
        """A file with ``text`` for the length of a ``with`` block."""
        import tempfile
        from contextlib import contextmanager

        @contextmanager
        def file() -> Iterator[str]:
            with tempfile.TemporaryDirectory(prefix="prunescope-") as folder:
                path = Path(folder) / name
                path.write_text(text or "", "utf-8")
                yield str(path)

        return file()


# --- the dropped folders of the paper's code ---------------------------------------------------------------------------


def checkpoint_folder(root: str | Path, tag: str, target_layer: str, drop_n: int) -> Path:
    """Where the paper's code keeps what it dropped: attention or MLP sublayers, or (``all``) whole blocks."""
    if target_layer == "all":
        return Path(root) / "block_drop" / f"{tag}-block_drop-all-discrete-drop{drop_n}" / "checkpoint"
    return Path(root) / f"{tag}-layer_drop_{target_layer}-discrete-drop{drop_n}" / "checkpoint"


def _target(args: Namespace, needed: bool = True) -> tuple[str | None, list[str]]:
    """TARGET of our commands, and the log line that names what is dropped. Sets ``args.model_name``."""
    if args.model_name is None:
        if args.model_postfix is None:
            raise UserError("no model: give --model_name (an id, a folder, a .gguf file or smollm2-135m)")
        root = args.model_root_path
        args.model_name = args.model_postfix if root is None else str(Path(root) / args.model_postfix)
    if args.analysis_mode == "pruned":
        if not args.pruned_model_name:
            raise UserError("--analysis_mode pruned compares with a pruned model: give --pruned_model_name")
        return args.pruned_model_name, []
    if args.drop_n == 0 and not needed:
        return None, ["drop_attn_list: [] | drop_mlp_list: [] (every sublayer dropped in turn)"]
    if args.drop_n < 1:
        raise UserError(
            f"--drop_n {args.drop_n}: nothing is dropped, so that there is nothing to compare; give 1 or more"
        )
    if not args.dropped_root_path:
        raise UserError("--analysis_mode dropped needs --dropped_root_path, the folder that paper/inter-layer wrote")
    lists = read_drop_lists(args)
    spec = ";".join(f"{kind}={','.join(map(str, layers))}" for kind, layers in lists.items() if layers)
    return f"drop:{spec}", [f"drop_attn_list: {lists['attn']} | drop_mlp_list: {lists['mlp']}"]


def read_drop_lists(args: Namespace) -> dict[str, list[int]]:
    """The lists in the folder that the flags name. Raises UserError if there is none, or if the lists are not what was asked for."""
    from prunescope.models.loading import layer_list

    name = args.model_name.rstrip("/")
    tags = list(dict.fromkeys([args.model_tag or args.model_postfix or name, name.rpartition("/")[2]]))
    tags = tags[:1] if args.model_tag else tags
    folders = [checkpoint_folder(args.dropped_root_path, tag, args.target_layer, args.drop_n) for tag in tags]
    path = next((folder / "config.json" for folder in folders if (folder / "config.json").is_file()), None)
    if path is None:
        raise UserError(
            f"no dropped model: looked for {' and '.join(str(folder / 'config.json') for folder in folders)}; make it with paper/inter-layer/compress.py, or give --model_tag"
        )
    try:
        config = json.loads(path.read_text("utf-8"))
        lists = {
            kind: list(layer_list(f"{path}: drop_{kind}_list", config.get(f"drop_{kind}_list")))
            for kind in ("attn", "mlp")
        }
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({error}); drop again") from error
    for kind, layers in lists.items():
        wanted = args.drop_n if args.target_layer in (kind, "all") else 0
        if len(layers) != wanted:
            raise UserError(
                f"{path} drops {len(layers)} {kind} sublayers {layers}, but --target_layer {args.target_layer} --drop_n {args.drop_n} asks for {wanted}; give the flags it was made with"
            )
    return lists


# --- log lines ---------------------------------------------------------------------------------------------------------


def against_target(alpha: float, orth: float) -> tuple[float, float]:
    """alpha and the orthogonal part of the way back, dense - target, relative to the target's vector.

    With X dense, Y target, and everything relative to the dense vector: a = <Y, X>/|X|^2 = 1 + alpha, o = |Y across X|/|X| and |Y|^2/|X|^2
    = a^2 + o^2. So <X - Y, Y>/|Y|^2 = -(a alpha + o^2) / (a^2 + o^2), and |X across Y|/|Y| = o / (a^2 + o^2).
    """
    a, o2 = 1 + alpha, orth * orth
    length2 = a * a + o2
    return -(a * alpha + o2) / length2, orth / length2


def transition_lines(row: dict[str, Any], label: str, dropped: bool) -> list[str]:
    """The lines of one sublayer at one step. In dropped mode the paper's code takes the dropped side as the base."""
    name = f"{row['layer']} {label} "
    side = "" if dropped else "_target"
    lines = [
        f"{name}emb sim:         {row['h_cos']:.4f}",
        f"{name}head sim:        {row['z_cos']:.4f}",
        f"{name}vocab sim:       {row['p_cos']:.4f}",
        f"{name}REAL_KL:         {row['kl_dense_target' if dropped else 'kl_target_dense']:.6f}",
        f"{name}KL_estimate:     {row[f'kl_est{side}']:.6f}",
        f"{name}REAL(1-cos):     {row['p_cos_dev']:.6f}",
        f"{name}1-cos_estimate:  {row[f'p_cos_dev_est{side}']:.6f}",
        f"{name}Uniform_Var:     {row['var_uniform']:.6f}",
    ]
    for space in "zh":
        alpha, orth = row[f"{space}_alpha"], row[f"{space}_orth_rel"]
        alpha, orth = against_target(alpha, orth) if dropped else (alpha, orth)
        para = abs(alpha)
        ratio = para / orth if orth else float("inf") if para else float("nan")
        capital = space.upper()
        lines += [
            f"{name}{capital}_real(1-cos):   {row[f'{space}_cos_dev']:.6f}",
            f"{name}{capital}_para_rel:      {para:.6f}",
            f"{name}{capital}_orth_rel:      {orth:.6f}",
            f"{name}{capital}_para_perp(mean):   {ratio:.6f}",
            f"{name}{capital}_para_perp(median): {ratio:.6f}",
            f"{name}{capital}_ratio_of_means:    {ratio:.6f}",
            f"{name}alpha_{space}_mean:    {alpha:.6f}",
        ]
    return lines


def generation_lines(table: pa.Table, prompt: int, name: str, temperature: float) -> list[str]:
    """The lists of one prompt over its free-running steps, scaled as the paper's code scales them."""
    import pyarrow.compute as pc

    rows = table.filter(pc.and_(pc.equal(table["prompt"], prompt), pc.equal(table["regime"], "free-running")))

    def column(key: str) -> np.ndarray[Any, Any]:
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
        *(f"{key}: {values.tolist()}" for key, values in (estimates | logits).items()),
        *(f"summary_{key}_mean: {values.mean():.6f}" for key, values in logits.items()),
    ]


def option_lines(sample: dict[str, Any], whole: dict[str, Any], options: dict[str, Any]) -> list[str]:
    """The blocks of one question. KL is a sum over tokens: the paper's code divides it by the number of tokens."""
    letters = "/".join(text.strip() for text in sample["option_strings"])
    lines = [sample["text"], f"Subspace token ids: {sample['option_tokens']}"]
    for title, name, row in (("GLOBAL", "Global", whole), (f"SUBSPACE ({letters})", "Subspace", options)):
        lines += [f"\n===== {title} =====", f"{name} logits cosine: [{row['z_cos']}]"]
        lines += [f"{name} prob cosine: [{row['p_cos']}]", f"{name} KL: [{row['kl_dense_target']}]"]
    lines.append("\n===== TOP TOKENS (Original vs Dropped) =====")
    lines += [
        f"{token['text']!r:<15} | orig={token['p_dense']:.6f} | drop={token['p_target']:.6f}"
        for token in sample["top_dense"]
    ]
    lines.append("\n===== SUBWORD PROBABILITIES (Original vs Dropped) =====")
    both = zip(sample["option_strings"], whole["loglik_dense"], whole["loglik_target"], strict=True)
    return [*lines, *(f"{text:<10} | orig={p:.6f} | drop={q:.6f}" for text, p, q in both), "=" * 80]


# --- inter-layer and intra-layer ---------------------------------------------------------------------------------------

_IGNORED = (
    *("--stage", "--dataset_dir", "--split", "--prune_data_type", "--logging_steps", "--similarity_cache_file"),
    *("--overwrite_output_dir", "--cache_dir"),
)


def drop_layers(argv: Sequence[str] | None) -> None:
    """inter-layer/compress.py: LLM-Drop's flags; writes the checkpoint where the analysis scripts look for it."""
    parser = ArgumentParser(description="Drop attention or MLP sublayers, or whole blocks, as LLM-Drop does.")
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
        "--layer_drop_norm", default="True", help="True: score with the module's norm, as LLM-Drop does"
    )
    parser.add_argument(
        "--only_update_config", default="True", help="True: drop lists only; False: weights too, dropped branches zero"
    )
    parser.add_argument("--output_dir", help="the checkpoint goes to its subfolder checkpoint")
    parser.add_argument("--prune_model_save_path", help="folder of the checkpoint")
    parser.add_argument("--dropped_root_path", help="root of the paper's folder layout (ours)")
    parser.add_argument(
        "--model_tag", help="tag in the folder's name (ours); left out, the last part of the model's name"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help=SUPPRESS)
    for flag in _IGNORED:
        parser.add_argument(flag, nargs="?", help=SUPPRESS)
    args = parser.parse_args(argv)
    block = args.prune_method == "block_drop"
    order = args.block_drop_method if block else args.layer_drop_method
    if order == "post_dropping":
        raise UserError(f"post_dropping is not needed: --only_update_config False writes the weights in the same run as {'block' if block else 'layer'}_drop_method discrete")  # fmt: skip
    out = _checkpoint_path(args, block)
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
        overwrite=True,
    )


def _checkpoint_path(args: Namespace, block: bool) -> Path:
    if args.prune_model_save_path:
        return Path(args.prune_model_save_path)
    if args.output_dir:
        return Path(args.output_dir) / "checkpoint"
    if not args.dropped_root_path:
        raise UserError(
            "no place for the checkpoint: give --dropped_root_path, --output_dir or --prune_model_save_path"
        )
    tag = args.model_tag or args.model_name_or_path.rstrip("/").rpartition("/")[2]
    return checkpoint_folder(args.dropped_root_path, tag, "all" if block else args.target_layer, args.drop_n)


def _is_true(flag: str, value: str) -> bool:
    if value.lower() not in ("true", "false"):
        raise UserError(f"{flag} {value}: give True or False")
    return value.lower() == "true"


def prune_weights(argv: Sequence[str] | None) -> None:
    """intra-layer/main.py: weight pruning with the flags of the Wanda code."""
    parser = ArgumentParser(description="Prune weights: magnitude, Wanda, SparseGPT, or whole MLP neurons.")
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
