"""What a user is told: one line in the user's words, with what would work."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can put right; the command line prints it without a traceback."""

    exit_code = 1


class UsageError(UserError):
    """A mistake in a recipe or on the command line."""

    exit_code = 2


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` when something close is known, else nothing."""
    close = difflib.get_close_matches(str(word), [str(name) for name in known], n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
