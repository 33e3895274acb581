"""Points of a sweep spread over processes, GPUs or machines by Ray: every worker loads the model once and measures point after point."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from prunescope.errors import UserError, first_line, last_line
from prunescope.sweep.bench import Bench, SweepPlan
from prunescope.sweep.points import Point
from prunescope.sweep.tables import Measured

__all__ = ["measure_on_workers", "require_ray"]

_STORE = 200 * 2**20  # bytes of Ray's object store on a cluster of our own; a plan has a few


def require_ray() -> Any:
    """The module. Raises UserError where it is not installed."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        raise UserError("--workers and --ray-address need Ray; install it with: pip install prunescope[ray]") from error
    return ray


class _Worker:
    """Lives in a process of its own."""

    def __init__(self, model: dict[str, Any], plan: SweepPlan, threads: int) -> None:
        from prunescope.models.loading import load_model

        if threads:
            torch.set_num_threads(threads)
        self.bench = Bench(load_model(**model), plan)

    def measure(self, point: Point) -> tuple[Point, Measured]:
        return point, self.bench.measure(point)


def measure_on_workers(
    points: Sequence[Point],
    model: dict[str, Any],
    plan: SweepPlan,
    *,
    workers: int,
    address: str | None,
    done: Callable[[Point, Measured], None],
) -> None:
    """Measure ``points`` on ``workers`` processes; ``done`` is called here for each, as they come.

    Args:
        model: options of `load_model`. What it names must be reachable on every machine.
        workers: at most so many; each takes a GPU where the cluster has any, else a CPU core.
        address: of a running Ray cluster; None starts one on this machine, with the threads of this process shared out, and ends it.
    Raises:
        UserError: no Ray, no such cluster, or what a worker complained about.
    """
    ray = require_ray()
    from ray.util import ActorPool

    if not points:
        return
    workers = min(workers, len(points))
    with _cluster(ray, workers, address):
        gpus = 1 if ray.cluster_resources().get("GPU", 0) else 0
        threads = max(1, torch.get_num_threads() // workers) if address is None and not gpus else 0
        remote = ray.remote(num_cpus=1, num_gpus=gpus)(_Worker)
        shared = ray.put(plan)
        actors = [remote.remote(model, shared, threads) for _ in range(workers)]
        pool = ActorPool(actors)
        try:
            for found in pool.map_unordered(lambda actor, point: actor.measure.remote(point), points):
                done(*found)
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, UserError):
                raise UserError(str(cause)) from error
            raise UserError(
                f"a worker of the sweep died ({last_line(error)}); continue with --resume, perhaps with fewer --workers"
            ) from error
        finally:
            for actor in actors:
                ray.kill(actor)


@contextmanager
def _cluster(ray: Any, workers: int, address: str | None) -> Any:
    options: dict[str, Any] = {"address": address or "local", "log_to_driver": False}
    if address is None:
        options |= {"num_cpus": workers, "include_dashboard": False, "object_store_memory": _STORE}
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
