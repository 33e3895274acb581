"""What was written must load elsewhere: plain transformers builds the folder's model on the meta device and must find every weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prunescope.errors import UserError, first_line
from prunescope.models.loading import quiet_transformers

__all__ = ["check_written"]


def check_written(folder: Path, kind: type[Any]) -> None:
    """Load ``folder`` as ``kind``, a class of transformers, without its values. Called before the folder gets its name.

    Names and shapes are checked after transformers' own renaming and fusing of weights. Tensors that the class has no place for are allowed:
    published checkpoints have them too.
    Raises:
        UserError: transformers does not load it, or would fill weights with random numbers.
    """
    with quiet_transformers(local=True):
        try:
            _, info = kind.from_pretrained(folder, device_map="meta", output_loading_info=True, local_files_only=True)
        except Exception as error:  # whatever it is, nobody could load the folder
            raise UserError(f"{kind.__name__}: what would be written does not load in transformers ({first_line(error)}); nothing was written") from error  # fmt: skip
    lost = sorted(map(str, [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]))
    if lost:
        raise UserError(f"{kind.__name__}: transformers would not find {len(lost)} weights in what would be written, {lost[0]} first; nothing was written")  # fmt: skip
