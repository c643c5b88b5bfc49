"""Recipes are trees of frozen dataclasses; here they become plain trees and back, and single leaves are changed.

changed(recipe, {"optim.lr": "3e-5", "lora.targets": "[decoder, vision]"})
to_tree(recipe)     {"optim": {"lr": 3e-05, …}, …}      JSON and YAML types
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

import yaml

from paligemma.errors import OptionError, nearest

T = TypeVar("T")


def to_tree(value: Any) -> Any:
    """A dataclass, and all below it, as JSON types."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_tree(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return [to_tree(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): to_tree(item) for key, item in value.items()}
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def leaves(recipe: Any, prefix: str = "") -> list[str]:
    """Dotted names of all fields, branches included."""
    names: list[str] = []
    for f in dataclasses.fields(recipe):
        name, value = f"{prefix}{f.name}", getattr(recipe, f.name)
        names.append(name)
        if dataclasses.is_dataclass(value):
            names += leaves(value, f"{name}.")
    return names


def changed(recipe: T, changes: Mapping[str, Any]) -> T:
    """A recipe with some leaves changed.

    Args:
        changes: dotted name -> value; text is read as YAML and must be of the field's type.

    Raises:
        OptionError: a name that does not exist, with the nearest that does, or a value of the wrong kind.
    """
    for name, value in changes.items():
        recipe = _set(recipe, name.replace("-", "_").split("."), value, name, recipe)
    return recipe


def from_tree(recipe: T, tree: Mapping[str, Any]) -> T:
    """A recipe with the leaves of a nested tree, as `to_tree` and YAML files write it.

    The leaves of a branch change together: one that only makes sense with another may come before it.

    Raises:
        OptionError: as `changed`.
    """
    made: T = _merged(recipe, tree, "", recipe)
    return made


def _merged(node: Any, tree: Mapping[str, Any], prefix: str, root: Any) -> Any:
    hints, values = typing.get_type_hints(type(node)), {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if key not in {f.name for f in dataclasses.fields(node)}:
            raise _unknown(name, root)
        child = getattr(node, key)
        if isinstance(value, Mapping) and dataclasses.is_dataclass(child):
            values[key] = _merged(child, value, f"{name}.", root)
        else:
            values[key] = _convert(value, hints[key], name)
    return dataclasses.replace(node, **values)


def parse_value(text: str) -> Any:
    """Text as YAML reads it, but "1e-5" is a number and "none" is None, in lists as well."""
    try:
        return float(text) if "e" in text.lower() else _nones(yaml.safe_load(text))
    except ValueError:
        pass
    except yaml.YAMLError:
        return text
    try:
        return _nones(yaml.safe_load(text))
    except yaml.YAMLError:
        return text


def _nones(value: Any) -> Any:
    if isinstance(value, list):
        return [_nones(item) for item in value]
    return None if isinstance(value, str) and value.strip().lower() in ("none", "null", "~") else value


def _set(node: Any, path: list[str], value: Any, whole: str, root: Any) -> Any:
    head, rest = path[0], path[1:]
    known = {f.name: f for f in dataclasses.fields(node)} if dataclasses.is_dataclass(node) else {}
    if head not in known:
        raise _unknown(whole, root)
    if rest:
        child = getattr(node, head)
        if not dataclasses.is_dataclass(child):
            raise OptionError(f"the recipe's '{head}' has no fields: '{whole}' leads nowhere. Set '{head}' itself.")
        return dataclasses.replace(node, **{head: _set(child, rest, value, whole, root)})
    kind = typing.get_type_hints(type(node))[head]
    return dataclasses.replace(node, **{head: _convert(value, kind, whole)})


def _unknown(name: str, root: Any) -> OptionError:
    return OptionError(f"the recipe has no '{name}': expected one of its fields.{nearest(name, leaves(root))}")


def _convert(value: Any, kind: Any, name: str) -> Any:
    given = parse_value(value) if isinstance(value, str) and not _takes(kind, str) else value
    if isinstance(given, str) and given.lower() in ("none", "null") and _takes(kind, type(None)):
        given = None
    converted, fits = _fit(given, kind)
    if not fits:
        raise OptionError(f"{name}={value!r}: expected {_spell(kind)}.")
    return converted


def _takes(kind: Any, wanted: type) -> bool:
    options = typing.get_args(kind) if _is_union(kind) else (kind,)
    return wanted in options or (wanted is str and any(typing.get_origin(o) is typing.Literal for o in options))


def _fit(value: Any, kind: Any) -> tuple[Any, bool]:
    """The value as this kind, and whether it is one."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value, True
    if _is_union(kind):
        tries = [_fit(value, option) for option in args]
        return next((made for made, fits in tries if fits), value), any(fits for _, fits in tries)
    if origin is typing.Literal:
        return value, value in args
    if origin is tuple:
        if isinstance(value, str):
            value = [value]
        if not isinstance(value, list | tuple):
            return value, False
        kinds = [args[0]] * len(value) if len(args) == 2 and args[1] is Ellipsis else list(args)
        if len(kinds) != len(value):
            return value, False
        pairs = [_fit(item, each) for item, each in zip(value, kinds, strict=True)]
        return tuple(made for made, _ in pairs), all(fits for _, fits in pairs)
    if dataclasses.is_dataclass(kind):
        if isinstance(value, typing.cast(type, kind)):
            return value, True
        if not isinstance(value, Mapping):
            return value, False
        make = typing.cast(type, kind)
        return make(**{key: from_tree_field(kind, key, item) for key, item in value.items()}), True
    if kind is float:
        return (
            (float(value), True) if isinstance(value, int | float) and not isinstance(value, bool) else (value, False)
        )
    if kind is int:
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        return (int(value), True) if whole and not isinstance(value, bool) else (value, False)
    return value, isinstance(value, kind if isinstance(kind, type) else type(None))


def from_tree_field(kind: Any, name: str, value: Any) -> Any:
    """One field of a dataclass from a tree.

    Raises:
        OptionError: the dataclass has no such field.
    """
    hints = typing.get_type_hints(kind)
    if name not in hints:
        raise OptionError(f"{kind.__name__} has no '{name}': expected one of {', '.join(hints)}.{nearest(name, hints)}")
    return _convert(value, hints[name], name)


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def _spell(kind: Any) -> str:
    if _is_union(kind):
        return " or ".join(_spell(option) for option in typing.get_args(kind))
    if typing.get_origin(kind) is typing.Literal:
        return "one of " + ", ".join(str(option) for option in typing.get_args(kind))
    if kind is type(None):
        return "none"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return names.get(kind, str(kind).replace("typing.", ""))
