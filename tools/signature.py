"""A function's signature as JSON Schema, and a call's arguments back into what the signature asks for.

pydantic does both. It is imported when the first tool is defined, not before.
"""

from __future__ import annotations

import inspect
import math
import types
import typing
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, get_args, get_origin

from thinkloop.tools.tool import ToolError
from thinkloop.traces.events import Json, ThinkloopError


class DefinitionError(ThinkloopError):
    """A function that can't be made a tool; the message names it, the parameter, and what to change."""


@dataclass(frozen=True, slots=True)
class Parameters:
    """A function's parameters: their JSON Schema, and the conversion of arguments."""

    schema: Json
    _model: Any
    _positional_only: tuple[str, ...]
    _always: frozenset[str]
    """Parameters whose default stands in a pydantic `Field`: the function can't fill it in itself."""

    def bind(self, arguments: Json) -> tuple[list[Any], dict[str, Any]]:
        """Positional and keyword arguments, converted. Parameters that were not given are left to the function's own
        defaults. Raises `ToolError` naming what doesn't convert."""
        from pydantic import ValidationError

        try:
            model = self._model.model_validate(arguments)
        except ValidationError as error:
            raise ToolError(f"The arguments don't fit: {_told(error)}.") from None
        given = {field.alias: getattr(model, key) for key, field in self._model.model_fields.items()
                 if key in model.model_fields_set or field.alias in self._always}  # fmt: skip
        return [given.pop(name) for name in self._positional_only if name in given], given


def read_signature(
    function: Callable[..., Any], tool_name: str, notes: Mapping[str, str], scope: Mapping[str, Any]
) -> Parameters:
    """The parameters of `function`. `notes` describe them by name; `scope` holds the names that annotations written as
    text may mean besides the function's globals. Raises `DefinitionError`."""
    parameters = _parameters(function)
    hints = _hints(function, tool_name, scope)
    fields: dict[str, Any] = {}
    for at, (name, parameter) in enumerate(parameters.items()):
        _check_kind(tool_name, parameter)
        if name not in hints:
            raise DefinitionError(_not_annotated(tool_name, name, is_first=at == 0))
        fields[f"arg_{at}"] = _field(tool_name, parameter, _portable(hints[name]), notes.get(name))
    model = _model(tool_name, fields)
    positional = tuple(name for name, p in parameters.items() if p.kind is p.POSITIONAL_ONLY)
    always = frozenset(name for name, parameter in parameters.items() if _is_field(parameter.default))
    return Parameters(_schema(model), model, positional, always)


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """What a model may pass: what a `functools.partial` has set by name stays set."""
    fixed = function.keywords if isinstance(function, partial) else {}
    try:
        parameters = inspect.signature(function).parameters
    except (ValueError, TypeError) as error:
        raise DefinitionError(f"{function!r} has no signature that can be read ({error}): write a typed function that "
                              "calls it.") from None  # fmt: skip
    return {name: parameter for name, parameter in parameters.items() if name not in fixed}


def _not_annotated(tool_name: str, name: str, *, is_first: bool) -> str:
    if name == "self" and is_first:
        return (f"`{tool_name}` is a method, which needs its object: make the tool from the object, as in "
                f"`tool(thing.{tool_name})`, or of a function.")  # fmt: skip
    return (f"`{tool_name}`: parameter `{name}` has no annotation, so the model can't be told what to pass. Annotate "
            f"it, for example `{name}: str`.")  # fmt: skip


def _is_field(default: object) -> bool:
    from pydantic.fields import FieldInfo

    return isinstance(default, FieldInfo)


def _hints(function: Callable[..., Any], tool_name: str, scope: Mapping[str, Any]) -> dict[str, Any]:
    plain = inspect.unwrap(function.func if isinstance(function, partial) else function)
    plain = plain if inspect.isroutine(plain) else type(plain).__call__
    try:
        return typing.get_type_hints(plain, localns=dict(scope), include_extras=True)
    except (NameError, TypeError, SyntaxError) as error:
        raise DefinitionError(f"`{tool_name}`: an annotation can't be read ({error}). Define or import its type "
                              "before the function.") from None  # fmt: skip


def _check_kind(tool_name: str, parameter: inspect.Parameter) -> None:
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        stars = ("*", "list") if parameter.kind is parameter.VAR_POSITIONAL else ("**", "dict")
        raise DefinitionError(f"`{tool_name}`: `{stars[0]}{parameter.name}` can't be described to a model. Name the "
                              f"parameters one by one, or take one `{stars[1]}`.")  # fmt: skip


def _field(tool_name: str, parameter: inspect.Parameter, hint: Any, note: str | None) -> tuple[Any, Any]:
    """The pydantic field of one parameter. Its name is an alias, so that any parameter name will do (`copy`, `_x`)."""
    from pydantic import Field

    default = ... if parameter.default is parameter.empty else parameter.default
    described = _note(hint) or note
    if _is_field(default):
        hint, default = _from_field(hint, default)
    hint = Annotated[hint, Field(description=described)] if described else hint
    _check_type(tool_name, parameter.name, hint)
    return hint, Field(default, alias=parameter.name)


def _from_field(hint: Any, given: Any) -> tuple[Any, Any]:
    """`x: int = Field(3, ge=1)` as a type with its bounds, and the default."""
    from pydantic import Field

    default = ... if given.is_required() else given.get_default(call_default_factory=True, validated_data={})
    described = [Field(description=given.description)] if given.description else []
    extras = (*given.metadata, *described)
    return (Annotated[(hint, *extras)] if extras else hint), default


def _note(hint: Any) -> str | None:
    """The text in `Annotated[type, "text"]`."""
    extras = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    return next((extra for extra in extras if isinstance(extra, str)), None)


def _check_type(tool_name: str, name: str, hint: Any) -> None:
    from pydantic import TypeAdapter
    from pydantic.errors import PydanticUserError
    from pydantic_core import SchemaError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            TypeAdapter(hint).json_schema()
    except (PydanticUserError, SchemaError, TypeError, RecursionError) as error:
        shown = getattr(hint, "__name__", None) or str(hint)
        why = str(error).splitlines()[0].rstrip(".")
        raise DefinitionError(f"`{tool_name}`: parameter `{name}` has type `{shown}`, which JSON can't carry ({why}). "
                              "Use str, int, float, bool, list, dict, Literal, Enum, a dataclass, a TypedDict or a "
                              "pydantic model, and make the object inside the function.") from None  # fmt: skip


def _model(tool_name: str, fields: dict[str, Any]) -> Any:
    from pydantic import ConfigDict, create_model

    return create_model(tool_name, __config__=ConfigDict(extra="forbid"), **fields)


def _schema(model: Any) -> Json:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a default without JSON is left out of the schema; the function still has it
        schema: Json = model.model_json_schema()
    schema = _without_titles(schema)
    schema.pop("description", None)
    schema.setdefault("properties", {})
    return schema


_NAMED = ("properties", "$defs", "patternProperties", "dependentSchemas")
_DATA = ("default", "const", "enum", "examples", "required")


def _without_titles(schema: Any) -> Any:
    """pydantic titles each part by its own name: tokens that say nothing. Properties called `title` stay."""
    if isinstance(schema, list):
        return [_without_titles(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {key: value for key, value in schema.items() if key != "title" and not _is_no_json(key, value)}
    return {key: _without_titles_in(key, value) for key, value in kept.items()}


def _is_no_json(key: str, value: Any) -> bool:
    """A default that is infinite or no number; the function still has it."""
    return key == "default" and isinstance(value, float) and not math.isfinite(value)


def _without_titles_in(key: str, value: Any) -> Any:
    if key in _DATA:
        return value
    if key in _NAMED and isinstance(value, dict):
        return {name: _without_titles(part) for name, part in value.items()}
    return _without_titles(value)


def _portable(hint: Any) -> Any:
    """The type with each `typing.TypedDict` in it made one that pydantic takes on Python 3.11 (it insists on
    `typing_extensions`' there, whose classes say which keys are required)."""
    if typing.is_typeddict(hint) and type(hint).__module__ == "typing":
        return _portable_typed_dict(hint)
    args = get_args(hint)
    if not args or get_origin(hint) is typing.Literal:
        return hint
    if get_origin(hint) is Annotated:
        return Annotated[(_portable(args[0]), *args[1:])]
    new = tuple(_portable(arg) for arg in args)
    return hint if new == args else _rebuilt(hint, new)


def _rebuilt(hint: Any, args: tuple[Any, ...]) -> Any:
    if hasattr(hint, "copy_with"):
        return hint.copy_with(args)
    origin = get_origin(hint)
    return typing.Union[args] if origin is types.UnionType else origin[args]  # noqa: UP007  # built at run time


def _portable_typed_dict(hint: Any) -> Any:
    from typing_extensions import TypedDict

    hints = typing.get_type_hints(hint, include_extras=True)
    fields = {key: _portable_item(key, kind, hint) for key, kind in hints.items()}
    made = TypedDict(hint.__name__, fields)  # type: ignore[misc]  # made at run time
    made.__doc__ = hint.__doc__
    return made


def _portable_item(key: str, kind: Any, owner: Any) -> Any:
    """One key's type. What its own annotation says wins: `__required_keys__` is wrong where annotations are text."""
    from typing import NotRequired

    marked = get_origin(kind)
    bare = _portable(get_args(kind)[0] if marked in (typing.Required, typing.NotRequired) else kind)
    required = marked is typing.Required or (key in owner.__required_keys__ and marked is not typing.NotRequired)
    return bare if required else NotRequired[bare]


def _told(error: Any) -> str:
    """pydantic's errors in one line, each with its place."""
    parts = []
    for item in error.errors(include_url=False, include_context=False, include_input=False)[:5]:
        place = ".".join(str(part) for part in item["loc"]) or "the arguments"
        parts.append(f"`{place[:100]}`: {item['msg'][:200]}")
    return "; ".join(parts)
