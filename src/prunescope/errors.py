"""The one exception that is the user's to fix."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in the input: the message is one line that says what is wrong, where, and the fix. The CLI exits with 2."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def first_line(error: BaseException) -> str:
    """The first line of another library's message that says something, and the next one where it ends with a colon; at most 300 characters.
    The error's type where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    whole = next((i for i, line in enumerate(lines, 1) if not line.endswith(":")), len(lines))
    return shortened(" ".join(lines[:whole]))


def last_line(error: BaseException) -> str:
    """The last line of a message that carries a traceback of another process; at most 300 characters."""
    return shortened(str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__)


def shortened(text: str, most: int = 300) -> str:
    """At most so many characters of a text that is not ours."""
    return text if len(text) <= most else f"{text[: most - 3]}..."
