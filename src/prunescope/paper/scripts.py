"""The command lines of the paper's public code (arXiv 2603.24652), flags unchanged, over prunescope's own commands.

The scripts in `paper/` are one call each of a function here. Every one writes an ordinary run folder or checkpoint, and prints and logs
the lines that the paper's code logs, under the same path and with the same labels. What a line means follows the paper's code in
that mode (docs/paper.md says where that differs from the paper, and where our numbers differ from that code). Not written: its lists
of the five most likely tokens at every sublayer and the medians over the vocabulary.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunescope import commands
from prunescope.errors import UserError
from prunescope.paper.flags import (
    IGNORED,
    analysis_flags,
    drop_flags,
    metric_temperature,
    prune_flags,
    sampling,
    writing_flags,
)
from prunescope.paper.folders import checkpoint_path, target_of
from prunescope.paper.log_lines import generation_lines, option_lines, transition_lines

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["compare_generation", "compare_layers", "compare_options", "drop_layers", "prune_weights", "run"]

PROMPT = "A baker made three times as many rolls as cakes. Together there were 24 of them. How many cakes did the baker make?"
QUESTION = {
    "question": "Which of these animals feeds its young with milk?",
    "choices": ["Lizard", "Trout", "Rabbit", "Crow"],
    "answer": 2,
    "id": "animals",
}


def run(script: Callable[[Sequence[str] | None], None]) -> None:
    """Run a script: the user's mistake is one line and exit code 2, as in the prunescope command."""
    try:
        script(None)
    except UserError as error:
        print(f"prunescope: {error}", file=sys.stderr)
        sys.exit(2)


def compare_layers(argv: Sequence[str] | None) -> None:
    """transition_layerwise_compare.py: every dropped sublayer (or every sublayer of a pruned model) in the same context."""
    args = writing_flags("Compare sublayers in the same context.", drop_n=0).parse_args(argv)
    target, lists, note = target_of(args, needed=False)
    log = Log(args, f"layerwise_{args.analysis_mode}/temp{args.temperature}", "log-cosine.txt")
    with prompts_of(args) as prompts:
        found = commands.layerwise(
            args.model_name, target, out=str(log.run_folder), prompts=prompts, overwrite=True, **sampling(args)
        )
    log(f"=== Layerwise Sublayer Metrics Log ({args.analysis_mode}) ===")
    for sample in found.samples():
        log(_prompt_line(args, sample), *note, "--- Dense Model Output ---", f"{sample['dense']}\n")
        rows = _rows_of(found.table(), sample["prompt"], lists)
        log.write(transition_lines(rows, dropped=args.analysis_mode == "dropped"))


def compare_generation(argv: Sequence[str] | None) -> None:
    """compare_generation_metrics.py: both models write, and are compared step by step."""
    args = writing_flags("Compare two models while they write.", drop_n=8).parse_args(argv)
    target, _, note = target_of(args)
    log = Log(
        args, f"{args.target_layer}/temp{args.temperature}", f"log_{args.analysis_mode}_drop{args.drop_n}-final.txt"
    )
    with prompts_of(args) as prompts:
        found = commands.generate(
            args.model_name, str(target), out=str(log.run_folder), prompts=prompts, overwrite=True, **sampling(args)
        )
    log(f"=== Final Comparison Log ({args.analysis_mode}) ===")
    name = args.analysis_mode
    for sample in found.samples():
        log(_prompt_line(args, sample), "--- Dense Model Output ---", f"{sample['dense']}\n", *note)
        log(f"--- {name.capitalize()} Model Output ---", f"{sample['target']}\n")
        log(*generation_lines(found.table(), sample["prompt"], name, metric_temperature(args)), "=" * 80)


def compare_options(argv: Sequence[str] | None) -> None:
    """compare_mcq_subspace_metrics.py: the whole vocabulary against the answer options."""
    parser = analysis_flags("Compare the vocabulary with the answer options.", drop_n=8)
    parser.add_argument("--mode", default="default", help="tag in the name of the log file")
    parser.add_argument("--questions", help="JSONL of questions (ours); left out, one built-in question")
    args = parser.parse_args(argv)
    target, _, note = target_of(args)
    log = Log(
        args,
        f"{args.target_layer}_{args.analysis_mode}_temp{args.temperature}",
        f"log_drop{args.drop_n}-{args.mode}-subspace.txt",
    )
    temperature = metric_temperature(args)
    with jsonl([QUESTION]) as built_in:
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


def drop_layers(argv: Sequence[str] | None) -> None:
    """inter-layer/compress.py: LLM-Drop's flags; writes the checkpoint where the analysis scripts look for it."""
    args = drop_flags().parse_args(argv)
    block = args.prune_method == "block_drop"
    order = args.block_drop_method if block else args.layer_drop_method
    if order == "post_dropping":
        raise UserError(f"post_dropping is not needed: --only_update_config False writes the weights in the same run as {'block' if block else 'layer'}_drop_method discrete")  # fmt: skip
    out = checkpoint_path(args, order)
    ignored = [flag for flag in IGNORED if hasattr(args, flag.removeprefix("--"))]
    if ignored:
        print(f"ignored, since they decide nothing here: {', '.join(ignored)}")
    commands.drop(
        args.model_name_or_path,
        target="block" if block else args.target_layer,
        n=args.drop_n,
        out=str(out),
        format="recipe" if args.only_update_config else "zeroed",
        order=order,
        score_on="norm" if args.layer_drop_norm and not block else "stream",
        calibration={"c4_val": "c4"}.get(args.dataset, args.dataset),
        samples=args.n_calibration_samples,
        seq_len=args.cutoff_len,
        seed=args.seed,
        revision=args.model_revision,
        overwrite=True,
    )


def prune_weights(argv: Sequence[str] | None) -> None:
    """intra-layer/main.py: weight pruning with the flags of the Wanda code."""
    args = prune_flags().parse_args(argv)
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


class Log:
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
def prompts_of(args: Namespace) -> Iterator[str]:
    """The prompts that the flags choose, as a file for the length of a ``with`` block."""
    from prunescope.data.prompts import Prompt, read_prompts

    chosen = [Prompt(PROMPT, "arithmetic")] if args.prompts is None else read_prompts(args.prompts)
    if args.prompt_idx is not None:
        if not 0 <= args.prompt_idx < len(chosen):
            raise UserError(f"--prompt_idx {args.prompt_idx}: there are prompts 0 to {len(chosen) - 1}")
        chosen = chosen[args.prompt_idx : args.prompt_idx + 1]
    with jsonl([{"prompt": prompt.text, "id": prompt.id, "kind": prompt.kind} for prompt in chosen]) as path:
        # the user's own file stands in the run's config, so that it can be run again
        yield path if args.prompts is None or args.prompt_idx is not None else args.prompts


@contextmanager
def jsonl(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
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
