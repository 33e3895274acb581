"""Push an exported folder to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from prunescope.errors import UserError, first_line

__all__ = ["push"]


def push(folder: Path, repository: str, *, private: bool) -> str:
    """Upload ``folder`` to ``repository``, made where it is not there yet; the token is the one that huggingface_hub finds. Returns the address.

    Raises:
        UserError: no token, no access or no network; the folder stays.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        done = api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Pruned with prunescope")
    except Exception as error:  # the hub's client, of whatever kind
        raise UserError(
            f"--push-to-hub {repository}: {first_line(error)}; the folder {folder} is complete, log in with: hf auth login"
        ) from error
    return str(done)
