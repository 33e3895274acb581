"""The flags of the paper's scripts, unchanged, and what they mean for our commands."""

from __future__ import annotations

from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError, Namespace
from typing import Any, NoReturn

from prunescope.errors import UserError

__all__ = [
    "TARGET_LAYERS",
    "Flags",
    "analysis_flags",
    "drop_flags",
    "metric_temperature",
    "prune_flags",
    "sampling",
    "writing_flags",
]

TARGET_LAYERS = ("attn", "mlp", "all")
IGNORED = (  # flags of LLM-Drop's trainer, data loader and launcher that decide nothing here
    *("--stage", "--dataset_dir", "--split", "--prune_data_type", "--template", "--streaming", "--mix_strategy"),
    *("--overwrite_cache", "--preprocessing_num_workers", "--cache_path", "--cache_dir", "--similarity_cache_file"),
    *("--use_fast_tokenizer", "--flash_attn", "--print_param_status", "--logging_steps", "--report_to", "--plot_loss"),
    *("--overwrite_output_dir", "--do_train", "--do_eval", "--deepspeed", "--local_rank", "--bf16", "--fp16", "--tf32"),
    *("--per_device_train_batch_size", "--per_device_eval_batch_size"),
)


class Flags(ArgumentParser):
    """Flags whose misuse is the user's mistake like any other: one line, no usage text."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def analysis_flags(description: str, drop_n: int) -> ArgumentParser:
    parser = Flags(description=description)
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


def writing_flags(description: str, drop_n: int) -> ArgumentParser:
    """The flags of the two scripts in which a model writes."""
    parser = analysis_flags(description, drop_n)
    parser.add_argument("--prompt_idx", type=int, help="only this prompt")
    parser.add_argument("--prompts", help="file of prompts (ours); left out, one built-in prompt")
    parser.add_argument(
        "--stop_at_eos", action="store_true", help="end a text at its end token (ours; the paper's code writes on)"
    )
    return parser


def metric_temperature(args: Namespace) -> float:
    return float(args.temperature) if args.temperature > 0 else 1.0


def sampling(args: Namespace) -> dict[str, Any]:
    return {
        "max_new_tokens": args.max_length,
        "temperature": args.temperature,
        "metric_temperature": metric_temperature(args),
        "top_k": args.top_k,
        "top_p": args.top_p,
        "seed": args.seed,
        "ignore_eos": not args.stop_at_eos,
    }


def true_or_false(value: str) -> bool:
    """What LLM-Drop's launchers write for a flag."""
    if value.lower() not in ("true", "false"):
        raise ArgumentTypeError(f"{value}: give True or False")
    return value.lower() == "true"


def drop_flags() -> ArgumentParser:
    """LLM-Drop's flags."""
    parser = Flags(description="Drop attention or MLP sublayers, or whole blocks, as LLM-Drop does.")
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
        type=true_or_false,
        nargs="?",
        const=True,
        default=True,
        help="True: score with the module's norm, as LLM-Drop does",
    )
    parser.add_argument(
        "--only_update_config",
        type=true_or_false,
        nargs="?",
        const=True,
        default=True,
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
    for flag in IGNORED:
        parser.add_argument(flag, nargs="?", default=SUPPRESS, help=SUPPRESS)
    return parser


def prune_flags() -> ArgumentParser:
    """The flags of the Wanda code."""
    parser = Flags(description="Prune weights: magnitude, Wanda, SparseGPT, or whole MLP neurons.")
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
    return parser
