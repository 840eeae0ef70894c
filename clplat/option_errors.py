"""What jsonargparse says about a component's options, as a person would say it."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
import re
import sys
from abc import ABC
from collections.abc import Mapping
from typing import Any

from clplat.errors import nearest


def reason(error: Exception, given: Mapping[str, Any] | None = None, parser: Any = None) -> str:
    """jsonargparse's message as `.key.inner_key: expected …`, on one line and without its Python types' dress."""
    text = re.sub(r"\s+", " ", str(error)).strip()
    text = re.sub(r"<class '([\w.]+)'>|\btyping\.", lambda m: m[1] or "", text)
    place = ""
    while match := re.match(_LAYERS, text):
        if match["key"]:
            name = match["key"]
            place += f".{name}" + (_failing_item(parser, given, name) if given and not place else "")
        elif match["name"] and not _is_dataclass(match["name"]):
            place += ".init_args"
        text = match["inner"] or match["rest"] or match["first"]
    return f"{place}: {_said_plainly(text)}"


_LAYERS = (
    r'Parser key "(?P<key>[\w.]+)": (?P<inner>.*)'
    r"|Problem with given class_path '(?P<name>[\w.]+)': (?P<rest>Parser key .*)"
    r"|Does not validate against any of the Union subtypes Subtypes: .*? Errors: - (?!Expected|Not a valid)"
    r"(?P<first>.*) - Expected a NoneType Given value type: .*"
)
"""What jsonargparse wraps around a reason: where it stands, a class to choose, and `or nothing` as another choice."""


def _failing_item(parser: Any, given: Mapping[str, Any], name: str) -> str:
    """`.1` where the second item is the one of a list that is refused; empty where the value is no list of mappings."""
    items = given.get(name)
    for number, item in enumerate(items if isinstance(items, list) else []):
        try:
            parser.parse_object(copy.deepcopy({**given, name: [item]}))
        except Exception:  # noqa: BLE001 - as in `checked`
            return f".{number}"
    return ""


def place_of(given: Any, said: str) -> str:
    """Where the component stands among a component's options that cannot be built by itself for the same `reason`, such
    as `.layers.2`; empty where there is none."""
    items = given.items() if isinstance(given, Mapping) else enumerate(given) if isinstance(given, list) else ()
    for name, item in items:
        if inner := place_of(item, said):
            return f".{name}{inner}"
        if isinstance(item, Mapping) and isinstance(item.get("class_path"), str) and _fails(item, said):
            return f".{name}"
    return ""


def _fails(component: Mapping[str, Any], said: str) -> bool:
    from jsonargparse import ArgumentParser

    parser, options = ArgumentParser(exit_on_error=False), copy.deepcopy(dict(component.get("init_args", {})))
    try:
        found = _imported(component["class_path"])
        parser.add_class_arguments(found, fail_untyped=False)
        found(**vars(parser.instantiate(parser.parse_object(options))))
    except Exception as error:  # noqa: BLE001 - whatever a class raises; one that lacks what its owner gives, too
        return reason(error) == said
    return False


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _is_dataclass(path: str) -> bool:
    return dataclasses.is_dataclass(_imported(path))


def _said_plainly(text: str) -> str:
    if match := re.search(r"following arguments are required: ([\w, ]+)\..*class_path='[\w.]+\.(\w+)'", text):
        return f"{match[2]} needs the option {match[1]}"
    if match := re.fullmatch(r"Expected a dot import path string: (\w+)", text):
        return f"name a component as {{class_path: {match[1]}}}"
    if match := re.search(r"class_path '([\w.]+)': Option '(\w+)' is not accepted", text):
        known = inspect.signature(found := _imported(match[1])).parameters
        return f"{found.__name__} has no option {match[2]!r}{nearest(match[2], known)}"
    if match := re.search(r": Option '(\w+)' is not accepted\. Got value: Namespace\(class_path='[\w.]+\.(\w+)'", text):
        return f"{match[2]} has no option {match[1]!r}"
    if match := re.fullmatch(r"Group '([\w.]+)' does not accept option '(\w+)'", text):
        return f"{match[1]} has no option {match[2]!r}"
    if match := re.match(r"Problem with given class_path '([\w.]+)': (.*)", text):
        return f"class_path {match[1]!r} cannot be used ({match[2]})"
    if match := re.search(r"Subtypes: \[(.*?)\] Errors: .*Given value: (.*)", text):
        return _expected([kind for kind in re.split(r", (?![^\[]*\])", match[1]) if kind != "NoneType"], match[2])
    if match := re.match(r"Expected an? (.*?)\. Got value: (.*)", text):
        return _expected([match[1]], match[2])
    return text


def _expected(kinds: list[str], got: str) -> str:
    """What an option takes and what it got, with the choice that was probably meant."""
    if asked := [found for kind in kinds if (found := _class_in(kind))]:
        return _expected_component(kinds, asked, got)
    choices = [choice for kind in kinds if kind.startswith("Literal[") for choice in re.findall(r"'([^']*)'", kind)]
    near = nearest(got.strip(chr(39)), choices, listed=False)
    if got.startswith("{") and all(kind in ("list", "collections.abc.Sequence") for kind in kinds):
        near = f"; one is a list, too: [{got}]"
    return f"expected {' or '.join(map(_kind, kinds))}, got {got}{near}{_quote(kinds, got)}"


def _quote(kinds: list[str], got: str) -> str:
    """What to do where YAML made something else of a text, as it does of `Q: {question}`."""
    read = {"{": "a mapping", "[": "a list"}.get(got[:1])
    if "str" not in kinds or read is None:
        return ""
    return f"; YAML reads {read} there: put the text in quotes, in a shell in two kinds of them: '\"…\"'"


def _expected_component(kinds: list[str], asked: list[type], got: str) -> str:
    """The same for components, or lists of them, with the names that there are."""
    known = {name for base in asked for name in _names(base)}
    got = re.sub(r"Namespace\(class_path='[\w.]*?(\w+)'(, init_args=Namespace\([^()]*\))?\)", r"\1", got)
    got = got.partition(". Got value: ")[0]
    words = [word.rpartition(".")[2] for word in re.findall(r"\b[A-Za-z_][\w.]*", got)]
    wrong = next((word for word in words if word not in known | {"class_path", "init_args"}), "")
    if got in known and any("Sequence[" in kind or kind.startswith("list") for kind in kinds):
        return f"expected {' or '.join(map(_kind, kinds))}, got {got}; one is a list, too: [{got}]"
    return f"expected {' or '.join(map(_kind, kinds))}, got {got}{nearest(wrong, known)}"


def _class_in(annotation: str) -> type | None:
    """The class of which an annotation asks for an instance, a list or a maker; only of what is imported already."""
    for path in reversed(re.findall(r"(?:[A-Za-z_]\w*\.)+[A-Z]\w*", annotation)):
        module, _, name = path.rpartition(".")
        found = getattr(sys.modules.get(module), name, None)
        if isinstance(found, type) and module not in ("collections.abc", "typing"):
            return found
    return None


def _names(base: type) -> set[str]:
    """A class and all that descend from it, if they can be built."""
    left_out = inspect.isabstract(base) or ABC in base.__bases__ or base.__name__.startswith("_")
    own = set() if left_out else {base.__name__}
    below: list[type] = base.__subclasses__()
    return own.union(*(_names(kind) for kind in below))


def _kind(annotation: str) -> str:
    """A type as a person says it."""
    if found := _class_in(annotation):
        several = "Sequence[" in annotation or annotation.startswith("list")
        article = "an" if found.__name__[0] in "AEIOU" else "a"
        return f"{'a list of' if several else article} {found.__name__}"
    choices = re.fullmatch(r"Literal\[(.*)\]", annotation)
    words = {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false"}
    words |= {"list": "a list", "dict": "a mapping", "collections.abc.Sequence": "a list"}
    return choices[1].replace(", ", " or ") if choices else words.get(annotation, annotation)
