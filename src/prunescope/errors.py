"""The one exception that is the user's to mend."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in the input: the message is one line that says what is wrong, where, and the mend. The CLI exits with 2."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def first_line(error: BaseException) -> str:
    """The first line of another library's message that says something, at most 300 characters; its type where it says nothing."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line if len(line) <= 300 else f"{line[:297]}..."
