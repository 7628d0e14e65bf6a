"""Where pixels and codes meet: files, jobs and the command line."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.generator import Generator

__all__ = ["Generator"]


def __getattr__(name: str) -> object:
    """Import a public name when it is first asked for: the command line answers without torch."""
    if name != "Generator":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pipelines.generator import Generator

    return Generator
