"""Mistakes a user can mend, told in one sentence: what must hold, what was found, what to do."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """What the command line tells in one line; any other exception is a fault of ours and shows where it comes from."""


class ConfigError(UserError):
    """The command line or the configuration is wrong; exit code 2."""


class StageError(UserError):
    """A stage cannot do its work: something it needs is missing, wrong or does not belong; exit code 1."""


@contextmanager
def told_to_user() -> Iterator[None]:
    """Take a ValueError of the block for the user's: what a model's files, or what is asked of it, lack."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise StageError(str(error)) from error
