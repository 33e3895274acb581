"""The folders of the paper's code: where it keeps dropped models, and which flags name which."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

from prunescope.errors import UserError

__all__ = ["checkpoint_folder", "checkpoint_path", "read_drop_lists", "target_of"]


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


def checkpoint_path(args: Namespace, order: str) -> Path:
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


def target_of(args: Namespace, needed: bool = True) -> tuple[str | None, dict[str, list[int]] | None, list[str]]:
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
