"""GGUF's types, by ggml's own quantisers: the ``gguf`` package has some in numpy, the library of the package libggml-python has all.

Both give the same bytes where both can. Types with blocks of 256 fall back where a row is no multiple of that, as llama.cpp's
``llama-quantize`` has it.
"""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunescope.errors import UserError

__all__ = ["TYPES", "bits_per_weight", "check", "fitting", "has_library", "round_trip"]

_IN_NUMPY = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "mxfp4", "tq1_0", "tq2_0")
_IN_LIBRARY = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs", "iq3_s")
TYPES = (*_IN_NUMPY, *_IN_LIBRARY)
_FALLBACK = {  # for rows that are no multiple of 256, from llama.cpp's tensor_type_fallback
    **dict.fromkeys(("q2_k", "q3_k", "tq1_0", "tq2_0"), "q4_0"),
    **dict.fromkeys(("iq4_xs", "iq3_s"), "iq4_nl"),
    **{"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"},
}


def fitting(width: int, name: str) -> str:
    """The type that rows of ``width`` weights are given where ``name`` is asked for; f16 where no block of 32 fits."""
    for candidate in (name, _FALLBACK.get(name, name)):
        if width % _sizes(candidate)[0] == 0:
            return candidate
    return "f16"


def bits_per_weight(width: int, name: str) -> float:
    """Bits that a weight takes in a row of ``width``, scales included."""
    weights, size = _sizes(fitting(width, name))
    return 8 * size / weights


def round_trip(weight: Tensor, name: str) -> Tensor:
    """``weight`` (out, in), any float dtype, through the type ``name`` and back; a new tensor of the same dtype and device.

    Raises:
        UserError: the type needs ggml's library, and that is not installed.
    """
    import gguf

    name = fitting(weight.shape[1], name)
    kind = gguf.GGMLQuantizationType[name.upper()]
    exact = np.ascontiguousarray(weight.detach().float().cpu().numpy())
    packed = _packed(exact, kind) if name in _IN_LIBRARY else gguf.quantize(exact, kind)
    back = torch.from_numpy(np.ascontiguousarray(gguf.dequantize(packed, kind), dtype=np.float32))
    return back.view(weight.shape).to(weight.device, weight.dtype)


def _sizes(name: str) -> tuple[int, int]:
    """Weights and bytes of a block."""
    import gguf

    weights, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]]
    return int(weights), int(size)


def _packed(exact: Any, kind: Any) -> Any:
    rows, width = exact.shape
    weights, size = _sizes(kind.name)
    packed = np.empty((rows, width // weights * size), np.uint8)
    _library().ggml_quantize_chunk(int(kind), exact.ctypes.data, packed.ctypes.data, 0, rows, width, None)
    return packed


def check(name: str) -> None:
    """Raise UserError if a type needs ggml's library, and that is not installed."""
    if name in _IN_LIBRARY:
        _library()


def has_library() -> bool:
    """Whether ggml's own library is installed, which has every type."""
    return bool(_files())


def _files() -> list[Path]:
    spec = importlib.util.find_spec("libggml")
    return sorted(Path(spec.origin).parent.glob("lib*/libggml-base.so")) if spec and spec.origin else []


@cache
def _library() -> ctypes.CDLL:
    found = _files()
    if not found:
        raise UserError(
            "types of GGUF with blocks of 256 (q2_k to q6_k, iq...) need ggml's quantisers; install them with: pip install libggml-python==0.20.2.post1"
        )
    library = ctypes.CDLL(str(found[0]))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p
    ]  # fmt: skip
    return library
