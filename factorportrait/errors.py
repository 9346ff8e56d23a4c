"""Errors that a person can act on. Command lines print them on one line and exit with code 2."""

from __future__ import annotations

import functools


class UserError(Exception):
    """Something outside the program is wrong: a file, an argument, the machine.

    Args:
        what: what is wrong, naming the file or argument.
        expected: what would have been right.
        found: what was there instead.
        action: the next thing to do.
    """

    def __init__(self, what: str, *, expected: str = "", found: str = "", action: str):
        self.what, self.expected, self.found, self.action = what, expected, found, action
        parts = [what]
        if expected:
            parts.append(f"expected {expected}")
        if found:
            parts.append(f"found {found}")
        if action:
            parts.append(action)
        super().__init__(" ".join("; ".join(parts).split()))

    def __reduce__(self):
        # An exception is rebuilt from its message alone, which would lose the parts on the way from a worker process.
        return functools.partial(type(self), expected=self.expected, found=self.found, action=self.action), (self.what,)


class BundleError(UserError):
    """A bundle is missing, damaged, or made by a newer version."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, or does not fit its config."""


class MediaError(UserError):
    """An input picture, video, mesh, camera file or CSV cannot be used."""
