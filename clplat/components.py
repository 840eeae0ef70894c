"""Components by name: find, check and build the classes that a configuration names.

A bare class name is looked up in its wing's source files, without importing them; a dotted name is imported,
also from the current folder, so that a class in one's own file needs no registration.
"""

from __future__ import annotations

import ast
import copy
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from clplat.errors import ConfigError, nearest
from clplat.option_errors import place_of, reason


@dataclass(frozen=True, kw_only=True)
class Component:
    """A class by import path, and its keyword arguments."""

    class_path: str
    init_args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Wing:
    """A family of components: where they live, their base class, and what the platform passes in itself."""

    package: str
    base: str
    supplied: frozenset[str] = frozenset()


WINGS = {
    "stream": Wing(package="clplat.streams", base="Stream", supplied=frozenset({"seed"})),
    "architecture": Wing(package="clplat.architectures", base="Architecture", supplied=frozenset({"spec"})),
    "strategy": Wing(package="clplat.strategies", base="Strategy"),
    "layer": Wing(package="clplat.architectures", base="LayerKind"),
    "optimizer": Wing(package="clplat.strategies.optimizers", base="Optimizer", supplied=frozenset({"params"})),
}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A component as `clplat list` shows it."""

    name: str
    path: str
    line: str
    paper: str


@cache
def catalogue(wing: str) -> dict[str, Entry]:
    """The components of a wing by bare name, read from the source text of its modules."""
    package = WINGS[wing].package
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    root = Path(spec.origin).parent
    classes: dict[str, tuple[Entry, list[str]]] = {}
    for file in sorted(root.rglob("*.py")):
        module = ".".join([package, *file.relative_to(root).with_suffix("").parts]).removesuffix(".__init__")
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef):
                classes[node.name] = (_entry(node, module), [ast.unparse(base).split(".")[-1] for base in node.bases])
    base = WINGS[wing].base

    def descends(name: str) -> bool:
        parents = classes[name][1] if name in classes else []
        return base in parents or any(descends(parent) for parent in parents if parent != name)

    return {
        name: entry
        for name, (entry, parents) in classes.items()
        if descends(name) and "ABC" not in parents and name not in {"Controller"} and not name.startswith("_")
    }


def _entry(node: ast.ClassDef, module: str) -> Entry:
    doc = (ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " ")
    paper = ""
    for item in node.body:
        target = item.targets[0] if isinstance(item, ast.Assign) else getattr(item, "target", None)
        value = getattr(item, "value", None)
        if isinstance(target, ast.Name) and target.id == "paper" and isinstance(value, ast.Constant):
            paper = str(value.value)
    return Entry(name=node.name, path=f"{module}.{node.name}", line=doc, paper=paper)


def resolve(name: str, wing: str, key: str) -> type:
    """The class that `name` means for the configuration key `key`; a clear error with near names otherwise."""
    known = catalogue(wing)
    path = known[name].path if name in known else name
    if "." not in path:
        if wing == "optimizer":
            return resolve(f"torch.optim.{name}", wing, key)
        raise ConfigError(
            f"{key}.class_path: no {wing} is called {name!r}{nearest(name, known)} "
            f"(a class of your own is named by its import path, as in my_module.{name})"
        )
    module_name, _, class_name = path.rpartition(".")
    try:
        with _current_folder_importable():
            module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and not module_name.startswith(error.name):
            raise ConfigError(
                f"{key}.class_path: {path!r} needs the package {error.name!r}, which is missing"
            ) from error
        raise ConfigError(
            f"{key}.class_path: there is no module {module_name!r} to import {class_name!r} from"
            f"{nearest(class_name, known, listed=False)} (a file of your own must lie in the current folder)"
        ) from error
    found = getattr(module, class_name, None)
    if not isinstance(found, type):
        classes = [n for n, value in vars(module).items() if isinstance(value, type)]
        raise ConfigError(f"{key}.class_path: {module_name} has no class {class_name!r}{nearest(class_name, classes)}")
    _check_family(found, wing, key)
    return found


def _check_family(found: type, wing: str, key: str) -> None:
    base = WINGS[wing].base
    if base not in {parent.__name__ for parent in found.__mro__}:
        raise ConfigError(f"{key}.class_path: {found.__name__} is not a {wing}; it must inherit from {base}")


@contextmanager
def _current_folder_importable() -> Iterator[None]:
    """Only while importing: a folder called `kernels` on the path for good breaks transformers."""
    folder = str(Path.cwd())
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def checked(component: Component, wing: str, key: str) -> Component:
    """The component with its full class path and every option checked, converted and filled in."""
    found = resolve(component.class_path, wing, key)
    options = _options(found, wing)
    for name in component.init_args:
        if name not in options:
            kinds = {option: options[option].kind for option in options if option not in WINGS[wing].supplied}
            known = [option for option, kind in kinds.items() if kind is not inspect.Parameter.VAR_KEYWORD]
            raise ConfigError(f"{key}.init_args.{name}: {found.__name__} has no such option{nearest(name, known)}")
    given = _given(component, found, wing)
    parser = _parser(found, wing)
    try:
        parsed = parser.parse_object(copy.deepcopy(given))
    except Exception as error:  # noqa: BLE001 - jsonargparse raises several unrelated types for bad input
        raise ConfigError(f"{key}.init_args{reason(error, given, parser)}") from error
    return Component(class_path=f"{found.__module__}.{found.__qualname__}", init_args=_plain(parsed))


def _given(component: Component, found: type, wing: str) -> dict[str, Any]:
    """The options to parse: a copy, since jsonargparse changes nested mappings in place."""
    supplied, options = WINGS[wing].supplied, _options(found, wing)
    given = _with_full_paths({name: value for name, value in component.init_args.items() if name not in supplied})
    for name, value in given.items():
        kind = str(options[name].annotation) if name in options else ""
        if isinstance(value, float) and value.is_integer() and "int" in kind and "float" not in kind:
            given[name] = int(value)  # 1e6 is how one writes a million
    return given


def _with_full_paths(value: Any) -> Any:
    """A copy in which the bare names of components inside a component's options are import paths."""
    if isinstance(value, Mapping):
        inner = {name: _with_full_paths(item) for name, item in value.items()}
        if isinstance(name := inner.get("class_path"), str) and "." not in name:
            inner["class_path"] = next((catalogue(w)[name].path for w in WINGS if name in catalogue(w)), name)
        return inner
    return [_with_full_paths(item) for item in value] if isinstance(value, list) else copy.deepcopy(value)


def _plain(value: Any) -> Any:
    """Parsed options as plain data, nested ones included."""
    from jsonargparse import Namespace

    if isinstance(value, Namespace | dict):
        items = vars(value) if isinstance(value, Namespace) else value
        if "__subclasses_disabled__" in items:
            # A nested dataclass that jsonargparse wrapped as if it were a class to choose.
            items = vars(items["init_args"])
        return {name: _plain(item) for name, item in items.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def build(component: Component, wing: str, key: str, supplied: Mapping[str, Any] | None = None) -> Any:
    """An instance of the component; `supplied` are arguments that the platform passes where they are declared."""
    found = resolve(component.class_path, wing, key)
    extra = {name: value for name, value in (supplied or {}).items() if name in _options(found, wing)}
    given = arguments(component, wing, key)
    try:
        return found(**extra, **given)
    except (ValueError, TypeError, FileNotFoundError) as error:
        raise ConfigError(f"{key}: {error}") from error


def arguments(component: Component, wing: str, key: str) -> dict[str, Any]:
    """The component's options as its constructor takes them, with the components among them built."""
    found = resolve(component.class_path, wing, key)
    parser, given = _parser(found, wing), _given(component, found, wing)
    try:
        return vars(parser.instantiate(parser.parse_object(copy.deepcopy(given))))
    except Exception as error:  # noqa: BLE001 - as in `checked`
        said = reason(error)
        raise ConfigError(f"{key}.init_args{place_of(given, said)}{said}") from error


def _parser(found: type, wing: str) -> Any:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(found, skip=set(WINGS[wing].supplied), fail_untyped=False)
    return parser


def _options(found: type, wing: str) -> dict[str, inspect.Parameter]:
    signature = inspect.signature(found.__init__)  # type: ignore[misc]
    return {name: option for name, option in signature.parameters.items() if name != "self"}
