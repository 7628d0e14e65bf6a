"""Mistakes a user can mend, told in one sentence: what must hold, what was found, what to do."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


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


class CommandParser(argparse.ArgumentParser):
    """The arguments of a command that takes no config alone; wrong usage is a `ConfigError`.

    Args:
        prog: the command, "smalti decode".
        description: what it does.
    """

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog, description=description, add_help=False, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see `{self.prog} --help`")
