"""The Hugging Face hub, asked once whether it is there: its libraries would try for half a minute in silence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prunescope.errors import first_line
from prunescope.progress import console

__all__ = ["one_try"]

_PATIENCE = 10.0  # seconds


@contextmanager
def one_try() -> Iterator[None]:
    """Within the block the hub's libraries read their local cache alone, if the hub does not answer now; that is said at once."""
    from huggingface_hub import constants, get_session

    unreachable = False
    if not constants.HF_HUB_OFFLINE:
        try:
            get_session().head(constants.ENDPOINT, timeout=_PATIENCE)
        except Exception as error:  # of whatever HTTP client the hub's library uses
            console.print(
                f"{constants.ENDPOINT} cannot be reached ({first_line(error)})", markup=False, highlight=False
            )
            unreachable = True
    if not unreachable:
        yield
        return
    import datasets  # which has a copy of the switch

    try:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        yield
    finally:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = False
