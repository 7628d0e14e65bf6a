"""Classes as a user names them."""

from collections.abc import Sequence

from pipelines.errors import StageError


def class_index(wanted: str | int, names: Sequence[str], setting: str) -> int:
    """Return the index of a class.

    A string is a name and a whole number an index, also where a class is called by that number. A string of digits
    that is no name counts as an index: a command line may have no other way to say it.

    Args:
        wanted: its name or index.
        names: of all classes.
        setting: that names it, for the message.

    Raises:
        StageError: there is no such class.
    """
    if isinstance(wanted, str) and wanted in names:
        return names.index(wanted)
    if str(wanted).isdecimal() and int(wanted) < len(names):
        return int(wanted)
    if not names:
        raise StageError(f"{setting} names the class {wanted!r}, but these images have none; leave it out")
    shown = ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
    raise StageError(
        f"{setting} names {wanted!r}, which is none of the {len(names)} classes: {shown}; "
        f"write a name as a string, an index below {len(names)} as a number"
    )
