"""Mistakes a user can mend, told in one sentence: what must hold, what was found, what to do."""


class ConfigError(ValueError):
    """The command line or the configuration is wrong; exit code 2."""


class StageError(ValueError):
    """A stage cannot do its work: something it needs is missing, wrong or does not belong; exit code 1."""
