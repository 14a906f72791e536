"""Reading a YAML file of keys: a configuration, a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


class YamlError(ValueError):
    """A file that cannot be read as YAML keys; the message names the file and what is wrong."""


def read_yaml(file: Path, what: str, keys: str) -> dict[str, Any]:
    """The keys of a YAML file. what: names such a file; keys: some that stand at its top. Raises YamlError."""
    try:
        data = yaml.load(file.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except OSError as error:
        raise YamlError(f"{file}: cannot read the {what} ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise YamlError(f"{file}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise YamlError(f"{file}: expected keys such as {keys} at the top")
    return data


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            name = self.construct_object(key)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {name!r} stands twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)
