"""A model whose weights stay on disk: its structure in memory, one block's weights at a time.

transformers itself maps the names of the checkpoint to those of the model, and fuses what it fuses (experts of MoE models), by loading
everything to `disk`; its hooks are then taken off, and blocks are loaded and let go here.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunescope.errors import UserError
from prunescope.files import parse_json
from prunescope.models.adapters import with_adapter
from prunescope.models.anatomy import find_anatomy, probe_ids
from prunescope.models.attending import any_length
from prunescope.models.finding import find_blocks, first_output, first_tensor, hooks
from prunescope.models.gguf import dequantise as dequantise_gguf
from prunescope.models.loaded import LoadedModel
from prunescope.models.loading import choose_device, choose_dtype, from_pretrained, missing_weights
from prunescope.models.matrices import Matrix, find_matrices
from prunescope.models.one_by_one import large_experts, one_at_a_time, slices
from prunescope.models.plain import check_plain, merged, settings, snapshot, unpacked
from prunescope.models.prefetching import Ahead
from prunescope.models.record import config_drop_lists, layers_of, read_record
from prunescope.models.references import expand_user, resolve
from prunescope.models.shards import DTYPES, INDEX, Stored, Tiles, read_header, stored_tensors

__all__ = ["StreamedModel", "is_weights", "pruned_weights", "stream_model"]

_PIECE = 2**22  # elements that are checked at a time
_LIBC: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
_LARGE = 2**32  # bytes of a block's experts from which on they are read one at a time
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")


@dataclass
class StreamedModel:
    """A causal LM whose parameters are on the meta device but for the length of a ``with`` block."""

    loaded: LoadedModel
    device: torch.device
    folder: Path  # plain folder of safetensors that the weights are read from
    stored: dict[str, Stored]  # every tensor on disk, by its name there
    weights: Mapping[str, Tensor]  # by the model's own names
    blocks: nn.ModuleList
    names: tuple[str, ...]  # of the blocks
    probe_ids: Tensor = field(
        default_factory=lambda: torch.empty(0)
    )  # what it was read with when it was opened, (1, tokens)
    probe: list[Tensor] = field(
        default_factory=list
    )  # the streams (1, tokens, d) into every block then, and after the last
    # by what is dropped: what the head reads of texts that were read
    read: dict[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    ahead: Ahead | None = field(default=None, repr=False)  # fetches the next block while one runs
    large: int | None = None  # bytes of a block's experts from which on they are read one at a time
    seconds: float = 0.0  # that it took to read all of it once, when it was opened
    checked: bool = False  # every weight was found to be finite then
    _known: dict[Any, list[str]] = field(default_factory=dict, repr=False)  # of a block, and what is large

    @property
    def model(self) -> Any:
        return self.loaded.model

    def close(self) -> None:
        """Unlock what is locked of the files; no block is read afterwards."""
        if self.ahead is not None:
            self.ahead.close()

    def matrices(self, layer: int) -> list[Matrix]:
        """The matrices of block ``layer`` that can be pruned."""
        return find_matrices(self.loaded.anatomy.blocks[layer], self.names[layer])

    @contextmanager
    def block(self, layer: int, weights: Mapping[str, Tensor] | None = None, *, mapped: bool = False) -> Iterator[None]:
        """Block ``layer`` with its weights, from the checkpoint or from elsewhere, for the length of the ``with``.

        Args:
            mapped: leave what can be used as it is in its mapped file, as `load_model` does.
        """
        source = self.weights if weights is None else weights
        ahead, prefix = self.ahead if weights is None else None, self.names[layer] + "."
        ready = {} if ahead is None else ahead.take(layer, self._names(layer))
        if ahead is not None and layer + 1 < len(self.blocks):
            ahead.begin(layer + 1, self._names(layer + 1))
        experts = self._large(layer)
        left = {id(p) for module in experts.values() for p in module.parameters(recurse=False)}
        # copies: what lies in a mapped file is aligned at random, and products round by that
        with ExitStack() as stack:
            block = self.blocks[layer]
            check = weights is not None or not self.checked
            stack.enter_context(
                _filled(block, prefix, source, self.device, left, copies=not mapped, ready=ready, check=check)
            )
            for name, module in experts.items():
                stack.enter_context(one_at_a_time(module, f"{prefix}{name}.", source, self.device))
            try:
                yield
            except BaseException:
                if ahead is not None:
                    ahead.discard()  # copies run into memory that is free when this is left
                raise
        if self.device.type == "cpu" and hasattr(_LIBC, "malloc_trim"):  # of glibc, which keeps a block's pieces
            _LIBC.malloc_trim(0)

    def _large(self, layer: int) -> dict[str, nn.Module]:
        """Modules of a block whose experts are read one at a time, by their names in it."""
        return {} if self.large is None else large_experts(self.blocks[layer], self.large)

    def _names(self, layer: int) -> list[str]:
        key = layer, self.large, str(self.loaded.dropped)
        if key not in self._known:
            left = tuple(f"{self.names[layer]}.{name}." for name in self._large(layer))
            names = (name for name, _ in self.blocks[layer].named_parameters(prefix=self.names[layer]))
            self._known[key] = [name for name in names if not left or not name.startswith(left)]
        return self._known[key]

    @contextmanager
    def outside(self, skip: Collection[nn.Module | nn.Parameter] = ()) -> Iterator[None]:
        """Everything outside the blocks with its weights (embeddings, final norm, head), but for ``skip``."""
        parts = [[part] if isinstance(part, nn.Parameter) else part.parameters() for part in (self.blocks, *skip)]
        skipped = {id(parameter) for part in parts for parameter in part}
        ready: Mapping[str, Tensor] = {}
        if self.ahead is not None:
            ready = self.ahead.take(-1, [name for name, p in self.model.named_parameters() if id(p) not in skipped])
        with _filled(self.model, "", self.weights, self.device, skipped, ready=ready, check=not self.checked):
            yield

    @contextmanager
    def ending(self) -> Iterator[None]:
        """What comes after the blocks with its weights; on a CPU but for the head's matrix, which `head_weight` reads by tiles."""
        head, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        tied = head.weight is embedding.weight
        cpu = [embedding, head.weight] if self.device.type == "cpu" else []
        with self.outside(skip=cpu or ([] if tied else [embedding])):
            yield

    @property
    def head_weight(self) -> Tensor:
        """``(V, d)``; on a CPU as `Tiles`, elsewhere there within `ending`."""
        weight = self.model.get_output_embeddings().weight
        if self.device.type != "cpu":
            return weight.detach()  # type: ignore[no-any-return]
        name = next(name for name, parameter in self.model.named_parameters() if parameter is weight)
        return Tiles(self.weights, name, weight.shape, weight.dtype)  # type: ignore[return-value]

    def states(self, ids: Tensor) -> Tensor:
        """What the head reads of texts that were read, see `prunescope.models.streaming.having_read`."""
        return self.read[str(self.loaded.dropped)](ids)

    @contextmanager
    def running(self, *, mapped: bool = False) -> Iterator[None]:
        """The whole model can run: each block's weights come when it is entered and go when it is left. ``mapped`` as for `block`. Attention
        is computed as where blocks run on their own, see `any_length`: another kernel rounds differently."""
        with self.outside(), any_length(), hooks() as handles, ExitStack() as all_blocks:
            for layer, block in enumerate(self.blocks):
                held = all_blocks.enter_context(ExitStack())

                def enter(*_: Any, layer: int = layer, held: ExitStack = held) -> None:
                    held.enter_context(self.block(layer, mapped=mapped))

                def leave(*_: Any, held: ExitStack = held) -> None:
                    held.close()

                handles.append(block.register_forward_pre_hook(enter))
                handles.append(block.register_forward_hook(leave))
            yield

    def on_disk(self, name: str, value: Tensor) -> dict[str, Tensor]:
        """A parameter as the checkpoint stores it: its name or names there, with its values.

        Raises:
            UserError: the checkpoint does not hold such a tensor.
        """
        from transformers.core_model_loading import revert_weight_conversion

        prefix = self.model.base_model_prefix + "."
        result = {}
        for key, tensor in revert_weight_conversion(self.model, {name: value}).items():
            spellings = (key, key.removeprefix(prefix), prefix + key)
            match = next((spelling for spelling in spellings if spelling in self.stored), None)
            if match is None:
                raise UserError(
                    f"{self.loaded.ref}: {name} would be stored as {key}, which its weights files do not hold; this checkpoint's format is not supported"
                )
            result[match] = tensor
        return result

    def stored_dtype(self, name: str) -> torch.dtype:
        """The dtype that a parameter has on disk. Raises UserError for one that the dtype of the computation cannot hold."""
        shape = self.model.get_parameter(name).shape
        kinds = {self.stored[key].dtype for key in self.on_disk(name, torch.empty(shape, device="meta"))}
        if len(kinds) != 1 or not kinds <= set(DTYPES):
            raise UserError(
                f"{self.loaded.ref}: {name} is stored as {', '.join(sorted(kinds))}; give a model in float32, bfloat16 or float16"
            )
        stored, computed = DTYPES[kinds.pop()], self.model.dtype
        if torch.promote_types(stored, computed) != computed:
            raise UserError(
                f"{self.loaded.ref}: {name} is stored as {stored}, which {computed} cannot hold; give --dtype {str(torch.promote_types(stored, torch.float32)).removeprefix('torch.')}"
            )
        return stored


def stream_model(
    ref: str,
    scratch: Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    adapter: str | Path | None = None,
    trust_remote_code: bool = False,
    dequantise: bool = False,
    experts: str | None = "eager",
    prefetch: bool = False,
) -> StreamedModel:
    """Open ``ref`` with its weights left on disk, read them once, and check them and what was found.

    Args:
        ref: as `load_model` takes it, but a recipe. A `.gguf` file is dequantised into ``scratch``, a tensor at a time.
        scratch: folder for what has to be converted before it can be read a block at a time (GGUF, experts of MoE models), and for the
            whole model with an adapter merged, which is in memory for a moment.
        dequantise: write packed weights into ``scratch`` as dense floats first; the whole model is in memory for a moment.
        dtype, device, revision, adapter, trust_remote_code: as in `load_model`; the dtype is that of the computation.
        experts: how transformers runs fused experts: one by one, so that each one's input is seen, or None for its own choice, as `load_model`.
        prefetch: fetch the next block while one runs (a GPU then holds two), and experts of 4 GB a block or more one at a time.
    Raises:
        UserError: as `load_model`, and for a checkpoint without weights of its own, or with quantised ones.
    """
    torch_device = choose_device(device)
    torch_dtype: Any = choose_dtype(dtype, torch_device)
    ref = expand_user(ref)
    record = read_record(Path(ref)) if Path(ref).is_dir() else None
    if record is not None and record.get("format") == "recipe":
        raise UserError(
            f"{ref}: a recipe has no weights of its own; write it with drop --format zeroed or compact, and give that"
        )
    base, found = with_adapter(ref, adapter)
    source, options, identity = resolve(base, revision)
    if found is not None:
        folder = merged(base, source, options | {"trust_remote_code": trust_remote_code}, found, scratch / "merged")
        identity |= found.identity
    elif "gguf_file" in options:
        folder = dequantise_gguf(ref, Path(source) / options["gguf_file"], scratch / "dense")
    elif Path(source).is_dir():
        folder = Path(source)
    else:
        folder = snapshot(ref, source, revision)
        identity["revision"] = folder.name
    if dequantise and settings(folder).get("quantization_config"):
        folder = unpacked(ref, folder, torch_device, trust_remote_code, scratch / "dequantised")
        identity["dequantised"] = "true"
    stored = stored_tensors(folder, ref)
    opened = _open(ref, folder, scratch / "converted", torch_dtype, trust_remote_code, experts)
    model, tokenizer, weights, stored_dtype = opened
    if config_drop_lists(ref, model.config):
        raise UserError(
            f"{ref}: its config.json drops sublayers; write it with drop --format zeroed or compact, and give that"
        )
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(torch_device)
    _, blocks = find_blocks(model)
    where = {id(module): name for name, module in model.named_modules()}
    names = tuple(where[id(block)] for block in blocks)
    loaded = LoadedModel(ref, model, tokenizer, None, identity, (), 0, record, stored_dtype)  # type: ignore[arg-type]
    streamed = StreamedModel(loaded, torch_device, folder, stored, weights, blocks, names)
    if prefetch:
        streamed.ahead, streamed.large = Ahead(weights, torch_device), _LARGE
    started = time.monotonic()
    with streamed.running(), _looking(streamed):
        streamed.probe_ids = probe_ids(model)
        loaded.anatomy = find_anatomy(model)
    streamed.seconds, streamed.checked = time.monotonic() - started, True
    loaded.layer_map, loaded.dense_layers = layers_of(ref, record, len(blocks))
    loaded.source = streamed
    return streamed


@contextmanager
def _looking(streamed: StreamedModel) -> Iterator[None]:
    """Keep the probe's streams and count the zeros of every matrix while the model is run for the first time."""
    streams: dict[int, Tensor] = {}
    meta = dict(streamed.model.named_parameters(remove_duplicate=False))

    with hooks() as handles:
        for layer, block in enumerate(streamed.blocks):

            def into(module: nn.Module, args: Any, kwargs: Any, layer: int = layer) -> None:
                streams[layer] = first_tensor(args, kwargs).clone()
                for name, parameter in module.named_parameters():
                    if parameter.dim() >= 2:
                        whole = f"{streamed.names[layer]}.{name}"
                        pieces = slices(streamed.weights, whole, parameter) if parameter.is_meta else [parameter]
                        zeros = sum(int(piece.numel() - piece.count_nonzero()) for piece in pieces)
                        streamed.loaded.zeros[id(meta[f"{streamed.names[layer]}.{name}"])] = zeros

            def out(_: nn.Module, args: Any, output: Any, layer: int = layer) -> None:
                streams[layer + 1] = first_output(output).clone()

            handles.append(block.register_forward_pre_hook(into, with_kwargs=True))
            handles.append(block.register_forward_hook(out))
        yield
    streamed.probe = [streams[layer] for layer in range(len(streamed.blocks) + 1)]


def pruned_weights(streamed: StreamedModel, parts: Collection[Path], scratch: Path) -> Mapping[str, Tensor]:
    """Weights by the model's names, those that ``parts`` hold (in the checkpoint's format) instead of the checkpoint's."""
    view = scratch / "view"
    view.mkdir(parents=True, exist_ok=True)
    for path in streamed.folder.iterdir():
        if path.is_file() and not is_weights(path.name):
            _link(path, view / path.name)
    files = {name: tensor.file for name, tensor in streamed.stored.items()}
    inside = {name: part for part in parts for name in read_header(part, str(part))}
    # transformers reads whole shards in the order of their names, and of a tensor that is in two it keeps the last
    ordered = [*sorted(set(files.values())), *sorted(set(inside.values()))]
    links = {file: f"shard-{i:05d}.safetensors" for i, file in enumerate(ordered)}
    files |= inside
    for file, link in links.items():
        _link(file, view / link)
    index = {"metadata": {}, "weight_map": {name: links[file] for name, file in files.items()}}
    (view / INDEX).write_text(json.dumps(index), "utf-8")
    custom = bool(getattr(streamed.model.config, "auto_map", None))
    weights = _open(streamed.loaded.ref, view, scratch / "view-converted", streamed.model.dtype, custom)[2]
    _check_read(streamed, weights, inside)
    return weights


def _check_read(streamed: StreamedModel, weights: Mapping[str, Tensor], inside: Mapping[str, Path]) -> None:
    """What was read must be what the parts hold."""
    from safetensors import safe_open

    for name, parameter in streamed.model.named_parameters():
        meta = torch.empty(parameter.shape, device="meta")
        keys = [key for key in streamed.on_disk(name, meta) if key in inside]
        if keys:
            values = streamed.on_disk(name, weights[name])
            for key in keys:
                with safe_open(inside[key], framework="pt") as file:
                    if not torch.equal(values[key], file.get_tensor(key).to(values[key].dtype)):
                        raise RuntimeError(f"{key} was not read back from {inside[key]}")


def is_weights(name: str) -> bool:
    """Whether a file of a model folder holds weights, or says where they are."""
    return name.endswith(_WEIGHTS)


def _link(file: Path, link: Path) -> None:
    link.unlink(missing_ok=True)
    link.symlink_to(file.resolve())


def _open(
    ref: str, folder: Path, converted: Path, dtype: Any, trust_remote_code: bool, experts: str | None = "eager"
) -> tuple[Any, Any, Mapping[str, Tensor], torch.dtype | None]:
    """Structure, tokenizer, weights by name, and the dtype on disk. No weight is in memory afterwards."""
    from accelerate.hooks import remove_hook_from_submodules

    try:
        config = parse_json((folder / "config.json").read_text("utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it is not an object")
    except (OSError, ValueError) as error:
        raise UserError(f"{ref}: its config.json cannot be read ({error}); fetch it again") from error
    check_plain(ref, config)
    placement = {"device_map": {"": "disk"}, "offload_folder": str(converted)}
    if experts is not None:
        placement["experts_implementation"] = experts
    options = {"trust_remote_code": trust_remote_code}
    model, tokenizer, missing, stored_dtype = from_pretrained(ref, str(folder), options, dtype, placement=placement)
    if missing:
        raise missing_weights(ref, missing)
    weights = _offloaded(model)
    remove_hook_from_submodules(model)
    return model.eval(), tokenizer, weights, stored_dtype


def _offloaded(model: nn.Module) -> Mapping[str, Tensor]:
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for single in getattr(hook, "hooks", [hook]):
            weights = getattr(single, "weights_map", None)
            if weights is not None:
                found: Mapping[str, Tensor] = getattr(weights, "dataset", weights)
                return found
    raise UserError(f"{type(model).__name__}: accelerate left no map of the weights on disk; use another version of it")


def _finite(value: Tensor) -> bool:
    return bool(torch.stack([torch.isfinite(piece).all() for piece in value.flatten().split(_PIECE)]).all())


@contextmanager
def _filled(
    module: nn.Module,
    prefix: str,
    weights: Mapping[str, Tensor],
    device: torch.device,
    skipped: Collection[int] = (),
    copies: bool = False,
    ready: Mapping[str, Tensor] | None = None,
    check: bool = True,
) -> Iterator[None]:
    """Parameters on the meta device replaced by real ones; one that occurs twice (tied) is loaded once. What is ``ready`` need not be read.
    ``check``: that all are finite."""
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    fresh: dict[int, nn.Parameter] = {}
    try:
        for name, parameter in list(module.named_parameters(remove_duplicate=False)):
            if id(parameter) in skipped:
                continue
            if id(parameter) not in fresh:
                found = (ready or {}).get(prefix + name)
                if found is None:
                    value = weights[prefix + name].to(device=device, dtype=parameter.dtype, copy=copies)
                else:
                    value = found.to(parameter.dtype)
                if check and not _finite(value):
                    raise UserError(f"{prefix}{name} holds NaN or infinite weights; the checkpoint is broken")
                fresh[id(parameter)] = nn.Parameter(value, requires_grad=False)
            path, _, leaf = name.rpartition(".")
            owner = module.get_submodule(path)
            owner._parameters[leaf] = fresh[id(parameter)]
            replaced.append((owner, leaf, parameter))
        ready = None
        yield
    finally:
        for owner, leaf, parameter in replaced:
            owner._parameters[leaf] = parameter
