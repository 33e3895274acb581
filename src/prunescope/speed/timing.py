"""Times on a device, and the two rates that no program can beat there: bytes and multiplications a second, measured in the same run."""

from __future__ import annotations

import time
import timeit
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch

__all__ = ["Rates", "Timing", "measure_rates", "timed"]


@dataclass(frozen=True)
class Timing:
    """Seconds of repeats of the same work."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def spread(self) -> float:
        """Slowest minus fastest, in seconds."""
        return max(self.seconds) - min(self.seconds)

    def and_then(self, later: Timing) -> Timing:
        """The repeats of both."""
        return Timing(self.seconds + later.seconds)

    def same_as(self, other: Timing) -> bool:
        """Whether two medians differ by no more than the larger of the two spreads: then the difference is noise."""
        return abs(self.median - other.median) <= max(self.spread, other.spread)


@dataclass(frozen=True)
class Rates:
    """What the device does in a second at best: bytes read, or moved, and operations of a matrix product in a dtype."""

    bytes_per_s: float
    operations_per_s: float


def timed(work: Callable[[], object], device: torch.device, repeats: int, warm_up: int = 1) -> Timing:
    """Seconds of ``work``, with the device's queue empty before and after; ``warm_up`` calls are not counted.

    Not by `torch.utils.benchmark.Timer`: it gives the mean of a block of calls or as many repeats as fit a time, where the spread needs each of
    ``repeats``; every block costs two more calls; and it waits for the current device only.
    """

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    for _ in range(warm_up):
        work()
    return Timing(tuple(timeit.repeat(work, timer=now, number=1, repeat=repeats)))


def measure_rates(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> Rates:
    """The better of reading a large buffer and copying it, and one large matrix product; the fastest of ``repeats``, on random numbers."""
    large = device.type == "cuda"
    count = (2**31 if large else 2**28) // torch.empty((), dtype=dtype).element_size()
    source = torch.rand(count, device=device).to(dtype)
    target = torch.empty_like(source)
    size = source.numel() * source.element_size()
    read = timed(source.sum, device, repeats)
    copied = timed(partial(target.copy_, source), device, repeats)
    del source, target
    side = 8192 if large else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = timed(partial(torch.matmul, a, b), device, repeats, warm_up=2)
    return Rates(max(size / min(read.seconds), 2 * size / min(copied.seconds)), 2 * side**3 / min(product.seconds))
