"""Plain data: YAML that can neither name code nor grow, whoever wrote it."""

from typing import Any

import yaml

# Settings are written by hand.
MAX_BYTES = 2**20


class _PlainData(yaml.SafeLoader):
    """YAML without tags of Python and without aliases, of which a few lines can make gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not allowed; write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """A key that stands twice would lose what stands under the first without a word."""
        names = [key.value for key, _ in node.value]
        if twice := next((name for number, name in enumerate(names) if name in names[:number]), None):
            raise yaml.YAMLError(f"{twice} stands twice; write what belongs under it in one place")
        return super().construct_mapping(node, deep)


def read_yaml(data: bytes) -> Any:
    """Return what a YAML file holds.

    Raises:
        ValueError: it is too large, or not YAML of plain data.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"it has {len(data)} bytes; settings have at most {MAX_BYTES}")
    try:
        return yaml.load(data.decode(), _PlainData)
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"it is not YAML: {' '.join(str(error).split())}") from error
