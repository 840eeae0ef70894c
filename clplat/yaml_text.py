"""YAML as studies are written in: numbers as everywhere else, and no key that is lost or changed without a word."""

from __future__ import annotations

import re
from typing import Any

import yaml

from clplat.errors import ConfigError

BOOLEAN = "YAML reads on, off, yes and no without quotes as true and false, and a name must be text"


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, as everywhere else."""


_Loader.yaml_implicit_resolvers = {
    key: [(tag, pattern) for tag, pattern in value if tag != "tag:yaml.org,2002:float"]
    for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.[\d_]*([eE][-+]?\d+)?|\.\d+([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(inf|nan))$"),
    list("-+0123456789."),
)


def _without_twins(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    """A mapping in which no key stands twice: of a copied and forgotten one the first would vanish."""
    keys = [
        key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge"
    ]
    for key in [key for key, _ in node.value if key.tag == "tag:yaml.org,2002:bool"]:
        raise ConfigError(f"{key.value}: {BOOLEAN}; write '{key.value}' (line {key.start_mark.line + 1})")
    for number, key in enumerate(keys):
        if key in keys[:number]:
            raise ConfigError(f"{key}: this key stands twice, the second time below line {node.start_mark.line + 1}")
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _without_twins)


def parse_yaml(text: str) -> Any:
    """Plain data from YAML text; executes nothing."""
    return yaml.load(text, Loader=_Loader)
