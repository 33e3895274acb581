"""What a loaded model has read and written in this process, so that the next command that asks the same of it need not run it again.

`layerwise`, `generate` and `mcq` let the dense model write and read the same for every target, and a sweep that goes on does so for every call. An
entry is found by all that decides its bits: the weights as they are now, the sublayers dropped, the tokens and the options. It lives and dies
with the `LoadedModel`; nothing is written to disk.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Recall", "fingerprint"]

_LIMIT = 64 * 2**20  # bytes of tensors
_WIDTH = 1024  # numbers of 64 bits in a row of a checksum
_GLANCE = 4096  # bytes of every tensor that are looked at each time


class Recall:
    """Entries of tensors by key. Where they come to more than ``limit`` bytes, those that were asked for longest ago go; 0 keeps nothing."""

    def __init__(self, limit: int = _LIMIT) -> None:
        self.limit = limit
        self._entries: OrderedDict[str, tuple[Tensor, ...]] = OrderedDict()
        self._seen: tuple[Any, str] = (None, "")  # of the weights: how they looked, and their checksum

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for entry in self._entries.values() for tensor in entry)

    def key(self, model: nn.Module, *what: Any) -> str | None:
        """The name of an entry; None where nothing is to be kept, or where the weights cannot be looked at.

        Args:
            what: all that decides the entry beside the model. Of a tensor the numbers count, of anything else what `repr` says.
        """
        weights = self._weights(model) if self.limit else None
        if weights is None:
            return None
        config = getattr(model, "config", None)
        how = (weights, torch.get_num_threads(), getattr(config, "_attn_implementation", None))
        digest = hashlib.sha256(repr(how).encode())
        for part in what:
            said = repr((part.dtype, part.tolist())) if isinstance(part, Tensor) else repr(part)
            digest.update(f"\0{said}".encode())
        return digest.hexdigest()

    def get(self, key: str | None) -> tuple[Tensor, ...] | None:
        """What was kept; not to be changed in place."""
        if key is None or key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key]

    def put(self, key: str | None, *entry: Tensor) -> None:
        if key is None:
            return
        self._entries.pop(key, None)
        self._entries[key] = entry
        while self.nbytes > self.limit:
            self._entries.popitem(last=False)

    def look_again(self) -> None:
        """The next key reads all weights: between two commands anything may have been written to them."""
        self._seen = None, ""

    def _weights(self, model: nn.Module) -> str | None:
        """`fingerprint`, taken once a command (`look_again`), and anew where a tensor was exchanged or written to, or where a glance at each finds
        other numbers: what is written through ``.data`` is not counted by torch."""
        tensors = list(_tensors(model))
        if any(tensor.is_meta or type(tensor.data) is not Tensor for tensor in tensors):
            return None
        looks = [(tensor.data_ptr(), tensor._version, tuple(tensor.shape), tensor.dtype) for tensor in tensors]
        looks_now = (looks, _glance(tensors))
        if self._seen[0] != looks_now:
            self._seen = looks_now, fingerprint(model)
        return self._seen[1]


def fingerprint(model: nn.Module) -> str:
    """A checksum of all parameters and buffers: of the bits of each the sums of rows and of columns, modulo 2^64. One read of the weights from memory
    and one from the cache, where SHA-256 would take several times as long."""
    digest = hashlib.sha256()
    for tensor in _tensors(model):
        digest.update(repr((tuple(tensor.shape), tensor.dtype)).encode())
        flat = _bytes(tensor)
        flat = (
            flat.clone() if flat.storage_offset() % 8 else flat
        )  # a slice of a file in memory need not begin at a number of 64 bits
        whole = flat.numel() // (8 * _WIDTH) * (8 * _WIDTH)
        if whole:
            rows = flat[:whole].view(torch.int64).view(-1, _WIDTH)
            sums = torch.cat([rows.sum(0), rows.sum(1)])
            digest.update(sums.cpu().numpy().tobytes())
        digest.update(flat[whole:].cpu().numpy().tobytes())
    return digest.hexdigest()


def _glance(tensors: list[Tensor]) -> str:
    """Some numbers from all over every tensor, with one copy from each device."""
    taken: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        flat = tensor.detach().view(-1) if tensor.is_contiguous() else tensor.detach().flatten()[:_GLANCE]
        some = flat[:: max(1, flat.nbytes // _GLANCE)].contiguous()
        taken.setdefault(tensor.device, []).append(_bytes(some))
    return hashlib.sha256(b"".join(torch.cat(parts).cpu().numpy().tobytes() for parts in taken.values())).hexdigest()


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
