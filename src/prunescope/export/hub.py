"""Push an exported folder to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from prunescope.errors import UserError, first_line

__all__ = ["check_repository", "push"]


def check_repository(name: str) -> None:
    """Raises UserError where ``name`` is not what the hub calls a repository, before anything is loaded."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--push-to-hub {name}: {first_line(error).rstrip('.')}; write OWNER/NAME") from error
    if name.count("/") != 1:
        raise UserError(f"--push-to-hub {name}: whose repository is not said; write OWNER/NAME")


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
            f"--push-to-hub {repository}: {first_line(error)}; the folder {folder} is complete: hf auth login, then hf upload {repository} {folder}"
        ) from error
    return str(done)
