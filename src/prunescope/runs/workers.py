"""Items of a run shared by several workers: processes of this machine, or actors of a Ray cluster.

Every worker loads the models once and computes item after item; what it finds comes back here, where it is written. What an item gives depends
on the models and the item alone, so that it does not matter who computed what. An item whose worker dies is computed again by another.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from multiprocessing import connection
from pathlib import Path
from typing import Any, Protocol

from prunescope.errors import UserError, first_line
from prunescope.runs.parcels import Parcel

__all__ = ["Compute", "Load", "Make", "Share", "Workers", "alone", "gathered", "processes", "ray_actors", "sharing"]

Compute = Callable[[Any], Any]  # an item -> what it gives
Load = Callable[[], tuple[Any, ...]]  # gives the models, in the process of a worker
Make = Callable[..., Compute]  # of the models that `Load` gave
Share = Callable[
    [Sequence[Any], Compute, Callable[[int, Any], None]], None
]  # items, who computes here, told what each gave
_TRIES = 3  # workers that an item may cost
_STORE = 200 * 2**20  # bytes of Ray's object store on a cluster of our own; what workers are told has a few


def alone(items: Sequence[Any], here: Compute, done: Callable[[int, Any], None]) -> None:
    """Every item in this process, one after the other; ``done`` is told its place in ``items`` and what it gave."""
    for place, item in enumerate(items):
        expect(here, items[place + 1] if place + 1 < len(items) else None)
        done(place, here(item))


def expect(compute: Compute, following: Any) -> None:
    """Tell what has a method ``expect`` which item it will be asked for after the next one, so that it can begin with it."""
    if following is not None and hasattr(compute, "expect"):
        compute.expect(following)


def sharing(workers: Workers | None, make: Make) -> Share:
    """How items are computed: `alone`, or by ``workers``, each with what ``make`` gives of its models."""
    return alone if workers is None else workers.sharing(make)


def gathered(share: Share, items: Sequence[Any], here: Compute, tell: Callable[[Any], None]) -> list[Any]:
    """What every item gave, in their order, whoever computed it; ``tell`` is told each as it comes."""
    found: dict[int, Any] = {}

    def done(place: int, value: Any) -> None:
        found[place] = value
        tell(value)

    share(items, here, done)
    return [found[place] for place in range(len(items))]


class _Worker:
    """Lives in a process of its own."""

    def __init__(self, load: Load, threads: int = 0) -> None:
        if threads:
            import torch

            torch.set_num_threads(threads)
        self._load = load
        self._models: tuple[Any, ...] | None = None

    def prepare(self, make: Make) -> None:
        if self._models is None:
            self._models = self._load()
        self._compute = make(*self._models)

    def compute(self, item: Any, following: Any) -> Any:
        expect(self._compute, following)
        return self._compute(item)


class _Hand(Protocol):
    """Computes one thing at a time, elsewhere."""

    lost: tuple[type[BaseException], ...]  # what its futures raise once it has died

    def prepare(self, make: Make) -> Future[None]: ...
    def compute(self, item: Any, following: Any) -> Future[Any]: ...
    def stop(self) -> None: ...


class Workers:
    """Started when there is something to do, kept until the ``with`` block of `processes` or `ray_actors` ends."""

    def __init__(self, count: int, start: Callable[[int], _Hand], helps: bool) -> None:
        self.count, self._start, self._helps = count, start, helps
        self._hands: dict[int, _Hand] = {}
        self.made: dict[int, Make] = {}  # what each worker is prepared for

    def sharing(self, make: Make) -> Share:
        """``make`` goes to every worker as it is, so it must be a function of a module, or a `functools.partial` of one."""

        def share(items: Sequence[Any], here: Compute, done: Callable[[int, Any], None]) -> None:
            if self._helps and len(items) < 2:
                alone(items, here, done)
            else:
                _Round(self, make, items, here, done).run()

        return share

    def hands(self, items: int, here: Compute) -> dict[int, _Hand]:
        """Those that share so many items, by number; 0 is this process, where it takes part."""
        first = int(self._helps)
        numbers = range(first, min(self.count, items))
        for number in numbers:
            if number not in self._hands:
                self._hands[number] = self._start(number)
        found = {number: self._hands[number] for number in numbers}
        return {0: _Here(here), **found} if first else found

    def replace(self, number: int) -> _Hand:
        """Another worker in the place of one that died."""
        self.made.pop(number, None)
        self._hands.pop(number).stop()
        self._hands[number] = self._start(number)
        return self._hands[number]

    def stop(self) -> None:
        for hand in self._hands.values():
            hand.stop()
        self._hands.clear()


class _Round:
    """Some items shared out."""

    def __init__(
        self, workers: Workers, make: Make, items: Sequence[Any], here: Compute, done: Callable[[int, Any], None]
    ) -> None:
        self.workers, self.make, self.items, self.here, self.done = workers, make, items, here, done
        self.waiting, self.left = deque(range(len(items))), len(items)
        self.died: Counter[int | None] = Counter()
        self.kept: dict[int, int] = {}  # place of the item that a hand was told to expect, by its number
        self.running: dict[Future[Any], tuple[int, _Hand, int | None]] = {}  # number of the hand, it, place of the item

    def run(self) -> None:
        if not self.items:
            return
        hands = self.workers.hands(len(self.items), self.here)
        self.count = len(hands)
        try:
            for number, hand in hands.items():
                if self.workers.made.get(number) is self.make:
                    self._give(number, hand)
                else:
                    self.running[hand.prepare(self.make)] = (number, hand, None)
            while self.left:  # a worker that still loads when all is done is not waited for
                for future in wait(self.running, return_when=FIRST_COMPLETED).done:
                    self._take(future)
        finally:
            if isinstance(hands.get(0), _Here):
                hands[0].stop()

    def _take(self, future: Future[Any]) -> None:
        number, hand, place = self.running.pop(future)
        error = future.exception()
        if isinstance(error, hand.lost):
            self._lost(number, place, error)
            return
        if error is not None:
            raise getattr(error, "cause", None) or error  # Ray puts the worker's own exception into ``cause``
        if place is None and not isinstance(hand, _Here):
            self.workers.made[number] = self.make
        self._give(number, hand)  # before what it gave is written, so that it does not wait for this
        if place is not None:
            self.done(place, future.result())
            self.left -= 1

    def _give(self, number: int, hand: _Hand) -> None:
        at = self.kept.pop(number, None)
        if at is None and self.waiting:
            at = self.waiting.popleft()
        if at is None:
            return
        if len(self.waiting) >= self.count and hasattr(self.here, "expect"):  # one stays for each of the others
            self.kept[number] = self.waiting.popleft()
        following = self.items[self.kept[number]] if number in self.kept else None
        self.running[hand.compute(self.items[at], following)] = (number, hand, at)

    def _lost(self, number: int, place: int | None, error: BaseException) -> None:
        self.died[place] += 1
        if self.died[place] == _TRIES:
            where = "while it loaded the models" if place is None else "at the same items"
            raise UserError(
                f"a worker died {_TRIES} times {where} ({first_line(error)}); continue with --resume, perhaps with fewer --workers"
            ) from error
        for at in (self.kept.pop(number, None), place):
            if at is not None:
                self.waiting.appendleft(at)
        hand = self.workers.replace(number)
        self.running[hand.prepare(self.make)] = (number, hand, None)


class _Here:
    """This process itself, whose models are there already."""

    lost: tuple[type[BaseException], ...] = ()

    def __init__(self, compute: Compute) -> None:
        import torch

        self._compute = compute
        on_gpu = torch.cuda.is_initialized()  # the current device is a thread's own
        device = (torch.cuda.set_device, (torch.cuda.current_device(),)) if on_gpu else (None, ())
        self._thread = ThreadPoolExecutor(1, "prunescope", *device)

    def prepare(self, make: Make) -> Future[None]:
        return self._thread.submit(lambda: None)

    def compute(self, item: Any, following: Any) -> Future[Any]:
        expect(self._compute, following)
        return self._thread.submit(self._compute, item)

    def stop(self) -> None:
        self._thread.shutdown(cancel_futures=True)


# --- processes of this machine -----------------------------------------------------------------------------------------

_worker: _Worker
_outbox: Path


class _Process:
    lost: tuple[type[BaseException], ...] = (BrokenProcessPool,)

    def __init__(self, load: Load, threads: int, gpu: str | None, outbox: Path) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, spawn, _begin, (load, threads, gpu, outbox))

    def prepare(self, make: Make) -> Future[None]:
        return self._submit(_prepare, make)

    def compute(self, item: Any, following: Any) -> Future[Any]:
        return self._submit(_compute, item, following)

    def _submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        try:
            return self._pool.submit(function, *arguments)
        except BrokenProcessPool as error:  # it died between two rounds
            failed: Future[Any] = Future()
            failed.set_exception(error)
            return failed

    def stop(self) -> None:
        for process in list((self._pool._processes or {}).values()):
            process.kill()
        self._pool.shutdown()


def _begin(load: Load, threads: int, gpu: str | None, outbox: Path) -> None:
    global _worker, _outbox
    _outbox = outbox
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process is told, and stops the others
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        connection.wait([parent.sentinel])
        shutil.rmtree(outbox, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    _worker = _Worker(load, threads)


def _prepare(make: Make) -> None:
    _worker.prepare(make)


def _compute(item: Any, following: Any) -> Any:
    return Parcel(_worker.compute(item, following), _outbox)


@contextmanager
def processes(count: int, load: Load, device: Any) -> Iterator[Workers]:
    """``count`` processes of this machine, of which this is one; each has a GPU of its own, or its share of the CPU's threads.

    Args:
        load: loads the models in another process, on its first GPU where this one has them on a GPU.
        device: torch device of the models here.
    Raises:
        UserError: fewer GPUs than workers.
    """
    import torch

    before = torch.get_num_threads()
    threads = max(1, before // count)
    gpus = _other_gpus(count, device) if device.type == "cuda" else None
    with ExitStack() as stack:
        outbox = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="prunescope-")))
        start = lambda number: _Process(load, threads, gpus[number - 1] if gpus else None, outbox)  # noqa: E731
        workers = Workers(count, start, helps=True)
        stack.callback(torch.set_num_threads, before)
        stack.callback(workers.stop)
        torch.set_num_threads(threads)
        yield workers


def _other_gpus(count: int, device: Any) -> list[str]:
    """What the other processes must see as their only GPU."""
    import torch

    there = torch.cuda.device_count()
    if there < count:
        raise UserError(f"--workers {count}: each takes a GPU, and {there} are here; give at most so many")
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = named.split(",") if named else [str(i) for i in range(there)]
    return [name for i, name in enumerate(names) if i != (device.index or 0)]


# --- Ray -----------------------------------------------------------------------------------------------------------------


class _Actor:
    def __init__(self, ray: Any, remote: Any, load: Load) -> None:
        self.lost: tuple[type[BaseException], ...] = (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError)
        self._ray, self._actor = ray, remote.remote(load)

    def prepare(self, make: Make) -> Future[None]:
        found: Future[None] = self._actor.prepare.remote(make).future()
        return found

    def compute(self, item: Any, following: Any) -> Future[Any]:
        found: Future[Any] = self._actor.compute.remote(item, following).future()
        return found

    def stop(self) -> None:
        self._ray.kill(self._actor)


def require_ray() -> Any:
    """The module. Raises UserError where it is not installed."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        raise UserError("--ray-address needs Ray; install it with: pip install prunescope[ray]") from error
    return ray


@contextmanager
def ray_actors(count: int, load: Load, address: str, gpu: bool) -> Iterator[Workers]:
    """``count`` actors of the Ray cluster at ``address``; this process only hands out and collects.

    Args:
        load: loads the models in another process. What it names must be reachable on every machine.
        address: of a running cluster; ``local`` starts one on this machine, and ends it.
        gpu: whether each takes a GPU where the cluster has any.
    Raises:
        UserError: no Ray, no such cluster, or one that has too little for so many.
    """
    ray = require_ray()
    with _cluster(ray, count, address):
        have = ray.cluster_resources()
        gpus = 1 if gpu and have.get("GPU", 0) else 0
        what, there = ("GPU", have["GPU"]) if gpus else ("CPU core", have.get("CPU", 0))
        if there < count:
            raise UserError(
                f"--workers {count}: each takes a {what}, and the cluster has {there:.0f}; give at most so many"
            )
        remote = ray.remote(num_cpus=1, num_gpus=gpus)(_Worker)
        workers = Workers(count, lambda _: _Actor(ray, remote, load), helps=False)
        try:
            yield workers
        finally:
            workers.stop()


@contextmanager
def _cluster(ray: Any, count: int, address: str) -> Iterator[None]:
    if ray.is_initialized():  # the caller's own session
        yield
        return
    options: dict[str, Any] = {"address": address, "log_to_driver": False}
    if address == "local":
        options |= {"num_cpus": count, "include_dashboard": False, "object_store_memory": _STORE}
    try:
        ray.init(**options, logging_level="error")
    except Exception as error:  # of many kinds, none of them ours
        raise UserError(
            f"--ray-address {address}: no Ray cluster there ({first_line(error)}); start it with ray start --head"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()
