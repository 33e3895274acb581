"""What prunescope does with a family, each check against plain transformers with hooks that zero the sublayer.

`python tests/family_checks.py [--out FILE.json] [FAMILY ...]` runs the checks; a result is ``works``, ``refused: reason``, ``wrong: how far``,
``traceback: error``, or ``not made: reason`` where no tiny model of the family runs on text alone in plain transformers.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

import torch
import transformers
from torch import Tensor, nn

import prunescope
import zoo
from prunescope.errors import UserError
from prunescope.models.dropping import DropSpec
from prunescope.models.loading import load_model
from prunescope.models.saving import save_dropped

CHECKS = ("load", "drop attn", "drop mlp", "cache", "layerwise", "zeroed", "compact", "magnitude", "wanda", "sparsegpt", "structured", "experts")  # fmt: skip
SECONDS = 60  # of CPU, a family; longer is a result too

# By hand, and owed to nothing in the code under test: what the children of blocks are called in transformers
_ATTENTION = r"(self_)?attn|(self_)?attention|multi_head_attention|linear_attn|mamba|mixer|conv|temporal_block|self_attention|attention_block|shared_mixer|delta_net|short_conv"
_MLP = r"(mlp|feed_forward|block_sparse_moe|moe|ffn|fc2|shared_mlp|feedforward|channel_mixer|mlp_block|mlp_moe|shared_experts?|moe_block|residual_mlp)"
_EXPERTS = r"(?i).*experts.*"  # the class of a module that holds the routed experts, or the name of a list of them
_SKIPPED = r"vision|visual|image|audio|encoder\.|siglip|qformer|connector|projector|resampler|speech"


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The decoder's blocks: the longest list outside towers whose length is the config's."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    found = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and not re.search(_SKIPPED, name)
    ]
    return list(found[0]) if found else []


def _zero(module: nn.Module, args: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return (torch.zeros_like(output[0]), *output[1:])
    return torch.zeros_like(output)


def _zero_fused(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    """For a module that adds the residual itself (BLOOM, MPT): what it adds is zero, so it gives the residual."""
    residual = kwargs.get("residual", args[1] if len(args) > 1 else None)
    return (residual, *output[1:]) if isinstance(output, tuple) else residual


def by_hand(model: nn.Module, spec: DropSpec) -> list[Any]:
    """Hooks on a plain model that silence the sublayers of ``spec``. Raises LookupError where the names are not known."""
    handles: list[Any] = []
    for layer, block in enumerate(_blocks(model)):
        for kind, pattern in (("attn", _ATTENTION), ("mlp", _MLP)):
            if layer not in spec.layers(kind):  # type: ignore[arg-type]
                continue
            children = [(name, child) for name, child in block.named_children() if re.fullmatch(pattern, name)]
            if not children:
                raise LookupError(f"{kind} of layer {layer}")
            for _, child in children:
                if "residual" in inspect.signature(child.forward).parameters:
                    handles.append(child.register_forward_hook(_zero_fused, with_kwargs=True))
                else:
                    handles.append(child.register_forward_hook(_zero))
    return handles


def _logits(model: Any, ids: Tensor, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=ids, **kwargs).logits
    return result


def _expected(model: Any, spec: DropSpec, ids: Tensor) -> Tensor:
    handles = by_hand(model, spec)
    try:
        return _logits(model, ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()


def _far(found: Tensor, expected: Tensor, tolerance: float = 2e-4) -> str:
    error = ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-9)).item()
    return "works" if error <= tolerance else f"wrong: {error:.1e}"


class _Family:
    def __init__(self, family: str, folder: Path) -> None:
        self.family, self.folder = family, folder
        self.plain: Any = zoo.family_folder(family, folder / "dense")
        self.cls = type(self.plain)
        self.plain = self.cls.from_pretrained(folder / "dense", dtype=torch.float32).eval()
        self.ids = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(1))
        self.dense = _logits(self.plain, self.ids, use_cache=False)
        if not torch.isfinite(self.dense).all():
            raise FloatingPointError("logits are not finite")
        self.loaded: Any = None

    def load(self) -> str:
        self.loaded = load_model(self.folder / "dense", device="cpu")
        if type(self.loaded.model) is not self.cls:
            return f"wrong: loaded as {type(self.loaded.model).__name__}"
        return _far(_logits(self.loaded.model, self.ids, use_cache=False), self.dense, 0.0)

    def _layers(self, kind: str) -> list[int]:
        return [part.layer for part in self.loaded.anatomy.sublayers() if part.kind == kind]

    def drop(self, kind: str) -> str:
        layers = self._layers(kind)
        if not layers:
            return "works" if kind == "mlp" else "refused: no such sublayer"
        results = []
        for chosen in {tuple(layers[:1]), tuple(layers[1:4:2])} - {()}:
            spec = DropSpec(**{kind: chosen})
            with self.loaded.dropping(spec):
                found = _logits(self.loaded.model, self.ids, use_cache=False)
            results.append(_far(found, _expected(self.plain, spec, self.ids)))
            if _far(found, self.dense, 1e-5) == "works":
                results.append("wrong: dropping changes nothing")
        if _far(_logits(self.loaded.model, self.ids, use_cache=False), self.dense, 0.0) != "works":
            return "wrong: restore"
        return max(results)

    def cache(self) -> str:
        def cached(model: Any) -> Tensor:
            first = model(input_ids=self.ids[:, :6], use_cache=True)
            cache, rows = first.past_key_values, [first.logits]
            for i in range(6, 9):
                step = model(input_ids=self.ids[:, i : i + 1], past_key_values=cache, use_cache=True)
                rows.append(step.logits)
            return torch.cat([rows[0], *rows[1:]], 1)

        with torch.no_grad():
            try:
                same = _far(cached(self.plain), self.dense, 1e-3) == "works"
            except Exception:
                same = False
            if not same:
                return "works"  # the dense model's own do not agree
            results = []
            for kind in ("attn", "mlp"):
                if layers := self._layers(kind):
                    with self.loaded.dropping(DropSpec(**{kind: tuple(layers[:2])})):
                        whole = _logits(self.loaded.model, self.ids, use_cache=False)
                        results.append(_far(cached(self.loaded.model), whole, 1e-3))
        return max(results)

    def layerwise(self) -> str:
        prompt = self.ids[0].tolist()
        (self.folder / "prompts.txt").write_text(" ".join(f"w{max(4, i)}" for i in prompt) + "\n", "utf-8")
        result = prunescope.layerwise(
            self.loaded, prompts=str(self.folder / "prompts.txt"), max_new_tokens=1, ignore_eos=True, lens="raw" if self.loaded.anatomy.final_norm is None else "final-norm"
        )  # fmt: skip
        last = list(self.loaded.anatomy.sublayers())[-1]
        row = next(r for r in result.table().to_pylist() if (r["layer"], r["sublayer"]) == (last.layer, last.kind))
        ids = torch.tensor([self.loaded.tokenizer((self.folder / "prompts.txt").read_text().strip())["input_ids"]])
        p, q = (
            logits[0, -1].double().log_softmax(-1)
            for logits in (_logits(self.plain, ids), _expected(self.plain, DropSpec.of([(last.kind, last.layer)]), ids))
        )
        kl = float((p.exp() * (p - q)).sum())
        error = abs(row["kl_dense_target"] - kl) / max(kl, 1e-9)
        return "works" if error < 2e-3 or abs(row["kl_dense_target"] - kl) < 1e-7 else f"wrong: KL off by {error:.1e}"

    def _reloaded(self, out: Path) -> Tensor:
        model, info = self.cls.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
        if info["missing_keys"] or info["mismatched_keys"]:
            raise AssertionError(f"plain transformers misses {sorted(info['missing_keys'])[:1]}")
        if info["unexpected_keys"]:
            raise AssertionError(f"plain transformers does not know {sorted(info['unexpected_keys'])[:1]}")
        return _logits(model.eval(), self.ids, use_cache=False)

    def saved(self, form: Any) -> str:
        kinds = ("attn", "mlp")
        both = sorted(set(self._layers("attn")) | set(self._layers("mlp")))[1]
        spec = DropSpec.of((kind, both) for kind in kinds if both in self._layers(kind))  # type: ignore[misc]
        out = self.folder / form
        out.mkdir()
        save_dropped(self.loaded, spec, out, form)
        result = _far(self._reloaded(out), _expected(self.plain, spec, self.ids))
        shutil.rmtree(out)
        return result

    @staticmethod
    def _count(model: nn.Module) -> int:
        return sum(p.numel() for p in model.parameters())

    def sparsify(self, method: Any) -> str:
        out = self.folder / method
        (self.folder / "text.txt").write_text(" ".join(f"w{4 + i * 7 % 36}" for i in range(400)), "utf-8")
        prunescope.sparsify(
            str(self.folder / "dense"), method=method, sparsity=0.25 if method == "experts" else 0.5, out=str(out),
            calibration="self" if method == "experts" else str(self.folder / "text.txt"),  # which no tokenizer has to read
            samples=2, seq_len=24, device="cpu", cache=False,
        )  # fmt: skip
        found = self._reloaded(out)
        again = load_model(out, device="cpu")
        if _far(found, self.dense, 1e-4) == "works":
            return "wrong: nothing was pruned"
        if method == "experts" and not self._count(again.model) < self._count(self.plain):
            return "wrong: no expert is gone"
        if method not in ("structured", "experts") and not 0.3 < again.sparsity() < 0.6:
            return f"wrong: sparsity {again.sparsity():.2f}"
        result = _far(_logits(again.model, self.ids, use_cache=False), found, 0.0)
        shutil.rmtree(out)
        return result


def _has_experts(model: nn.Module) -> bool:
    """Whether the text decoder has routed experts."""
    return any(
        (
            re.fullmatch(_EXPERTS, type(module).__name__)
            or (name.endswith(".experts") and len(list(module.children())) > 1)
        )
        and not re.search(_SKIPPED, name)
        for name, module in model.named_modules()
    )


def check_family(family: str, checks: tuple[str, ...] = CHECKS) -> dict[str, str]:
    """Every check of a family, by its name."""
    with tempfile.TemporaryDirectory() as folder, _within(SECONDS):
        try:
            case = _Family(family, Path(folder))
        except Exception as error:
            return {"load": f"not made: {_first(error)}"}
        runs: dict[str, Callable[[], str]] = {
            "load": case.load, "drop attn": lambda: case.drop("attn"), "drop mlp": lambda: case.drop("mlp"), "cache": case.cache,
            "layerwise": case.layerwise, "zeroed": lambda: case.saved("zeroed"), "compact": lambda: case.saved("compact"),
            **{method: (lambda method=method: case.sparsify(method)) for method in CHECKS[-5:]},
        }  # fmt: skip
        results: dict[str, str] = {}
        for name in checks:
            if name == "experts" and not _has_experts(case.plain):
                continue
            results[name] = _outcome(runs[name])
            if name == "load" and results[name] != "works":
                break
        return results


def _outcome(run: Callable[[], str]) -> str:
    try:
        return run()
    except UserError as error:
        return f"refused: {_first(error)}"
    except LookupError as error:
        return f"traceback: {_first(error)}" if type(error) is not LookupError else f"not checked: no name for {error}"
    except AssertionError as error:
        return f"wrong: {_first(error)}"
    except _TooLongError:
        return "traceback: took too long"
    except Exception as error:
        return f"traceback: {_first(error)}"


def _first(error: Exception) -> str:
    text = re.sub(r"/tmp/\S*?/(dense|zeroed|compact|magnitude|wanda|sparsegpt|structured|experts)", r"\1", str(error))
    text = (text.strip() or "?").splitlines()[0][:220]
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


class _TooLongError(Exception):
    pass


@contextlib.contextmanager
def _within(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise _TooLongError

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def works(results: dict[str, str]) -> bool:
    """Whether everything tried works; a structural refusal of `compact`, `structured` or `experts` says why, and counts."""
    return (
        all(
            result == "works" or (name in ("compact", "structured", "experts") and result.startswith("refused"))
            for name, result in results.items()
        )
        and len(results) > 1
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("families", nargs="*")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--part", default="0/1", help="i/n: every n-th family from the i-th")
    parser.add_argument("--checks", default=",".join(CHECKS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    part, parts = map(int, options.part.split("/"))
    found: dict[str, dict[str, str]] = {}
    os.environ["PRUNESCOPE_CACHE"] = tempfile.mkdtemp()
    for family in (options.families or list(zoo.FAMILIES))[part::parts]:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            try:
                found[family] = check_family(family, tuple(options.checks.split(",")))
            except _TooLongError:
                found[family] = {"load": "not made: took too long"}
        bad = {name: result for name, result in found[family].items() if result != "works"}
        print(f"{family}: {bad if bad else 'works'}", flush=True)
        if options.out:
            options.out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", "utf-8")
    print(f"{sum(map(works, found.values()))} of {len(found)} work")


if __name__ == "__main__":
    main()
