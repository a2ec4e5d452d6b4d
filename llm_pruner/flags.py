"""Command-line flags: declared as fields of a dataclass, parsed by argparse, checked where they are declared."""

from __future__ import annotations

import argparse
import difflib
import functools
import os
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Literal, TypeVar

from .errors import PrunerError

T = TypeVar("T", bound="Arguments")
Share = typing.Annotated[float, "share"]  # type of a flag that also takes 80% for 0.8


def flag(default: Any, help: str, *, group: str = "options", aliases: Sequence[str] = ()) -> Any:
    """Declare a flag as a dataclass field.

    Args:
        default: value when the flag is not given; a list becomes a default factory.
        help: phrase for ``--help``; the parser adds the default.
        group: heading in ``--help``.
        aliases: older spellings, without dashes.
    """
    metadata = {"help": help, "group": group, "aliases": tuple(aliases)}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(kw_only=True)
class Arguments:
    """Base of the flags of a command: splits lists at commas and refuses values outside a ``Literal``.

    A value that begins with ``~/`` begins with the home folder, for a shell does not expand ``--output=~/smaller``.

    Raises:
        PrunerError: a value is not one of its choices.
    """

    @classmethod
    def of(cls: type[T], **flags: Any) -> T:
        """Build arguments from flags by name, without dashes, in any of their spellings.

        Raises:
            PrunerError: a flag is unknown (the message names the nearest), or its value is not valid.
        """
        known = canonical_flags(cls)
        for name in flags:
            if name not in known:
                raise PrunerError(f"unknown argument {name}{_did_you_mean(name, known)}")
        return cls(**{known[name]: value for name, value in flags.items()})

    def check(self) -> None:
        """Refuse arguments that cannot work, before anything is loaded; the base refuses none.

        Raises:
            PrunerError: a value is not valid; the message names the flag.
        """

    def __post_init__(self) -> None:
        for one in fields(self):
            kind, value = value_type(type(self), one.name), getattr(self, one.name)
            if isinstance(value, os.PathLike):
                setattr(self, one.name, os.fspath(value))
            if kind.is_share and isinstance(value, str):
                setattr(self, one.name, _share_of_flag(one.name, value))
            if kind.several and not isinstance(value, (list, tuple, type(None))):
                setattr(self, one.name, split_list(str(value)))
            setattr(self, one.name, at_home(getattr(self, one.name)))
            for item in getattr(self, one.name) or () if kind.several else (value,):
                if kind.choices and item is not None and item not in kind.choices:
                    raise PrunerError(f"--{one.name} {item!r} is not valid: choose from {', '.join(kind.choices)}")


@dataclass(frozen=True, kw_only=True)
class ValueType:
    """Type of a flag's value.

    Attributes:
        convert: reads one value.
        several: the flag takes a list of values.
        is_share: the value may be written in percent.
    """

    convert: type
    choices: tuple[str, ...] = ()
    several: bool = False
    optional: bool = False
    is_share: bool = False


def value_type(arguments_class: type, name: str) -> ValueType:
    """Return the type of the flag ``name``, from its annotation."""
    return _value_types(arguments_class)[name]


@functools.cache
def _value_types(arguments_class: type) -> dict[str, ValueType]:
    return {
        name: _value_type(hint) for name, hint in typing.get_type_hints(arguments_class, include_extras=True).items()
    }


def _value_type(hint: Any) -> ValueType:
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    optional, (kind, *_) = type(None) in parts, [part for part in parts if part is not type(None)]
    if typing.get_origin(kind) is list:
        inner = _value_type(typing.get_args(kind)[0])
        return ValueType(convert=inner.convert, choices=inner.choices, several=True, optional=optional)
    if typing.get_origin(kind) is Literal:
        return ValueType(convert=str, choices=typing.get_args(kind), optional=optional)
    if typing.get_origin(kind) is typing.Annotated:
        return ValueType(convert=float, optional=optional, is_share=True)
    return ValueType(convert=kind, optional=optional)


def read_share(text: str) -> float:
    """Return the number that a text such as ``0.8`` or ``80%`` means.

    Raises:
        ValueError: the text is no number.

    >>> read_share("0.8"), read_share("80%")
    (0.8, 0.8)
    """
    return float(text[:-1]) / 100 if text.endswith("%") else float(text)


def _share_of_flag(name: str, text: str) -> float:
    try:
        return read_share(text.strip())
    except ValueError as error:
        raise PrunerError(f"--{name} {text!r} is not valid: give a share such as 0.8 or 80%") from error


def split_list(text: str | None) -> list[str]:
    """Split a comma-separated value into its entries.

    >>> split_list("wikitext2, ptb,")
    ['wikitext2', 'ptb']
    """
    return [entry.strip() for entry in (text or "").split(",") if entry.strip()]


def at_home(value: Any) -> Any:
    """Return a value of a flag, or a list of values, with the home folder for ``~`` at its beginning."""
    if isinstance(value, list):
        return [at_home(item) for item in value]
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value


def check_at_least(arguments: Any, least: int, *names: str) -> None:
    """Refuse flags below ``least``; flags that are not given pass.

    Raises:
        PrunerError: a flag is too small; the message names it.
    """
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise PrunerError(f"--{name} {value} is out of range: give {least} or more")


def check_combinations(
    arguments: Any,
    exclusive: Iterable[tuple[Sequence[str], Sequence[str], str]],
    requires: Iterable[tuple[str, Sequence[str]]],
) -> None:
    """Refuse flags that exclude each other, and flags without the flag that they need.

    A flag counts as given if its value is neither its default nor ``none``.

    Args:
        exclusive: flags, others that they exclude, and why.
        requires: a flag, and flags of which it needs one.

    Raises:
        PrunerError: with the names of both flags.
    """
    given = {one.name for one in fields(arguments) if getattr(arguments, one.name) not in (default_of(one), "none")}
    for left, right, why in exclusive:
        first = next((name for name in left if name in given), None)
        second = next((name for name in right if name in given and name != first), None)
        if first and second:
            raise PrunerError(f"--{first} and --{second} exclude each other ({why}): give one")
    for name, needed in requires:
        if name in given and not given.intersection(needed):
            *others, last = (f"--{flag}" for flag in needed)
            raise PrunerError(f"--{name} needs " + (f"one of {', '.join(others)} or {last}" if others else last))


def default_of(one: Field[Any]) -> Any:
    """Return the default of a dataclass field."""
    return one.default_factory() if one.default_factory is not MISSING else one.default


def canonical_flags(arguments_class: type) -> dict[str, str]:
    """Map every spelling of every flag to its field: ``{"base_model": "model", "model": "model", ...}``."""
    return {
        spelling: one.name
        for one in fields(arguments_class)
        for spelling in (one.name, *one.metadata.get("aliases", ()))
    }


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise PrunerError(message)


class _HelpFormatter(argparse.HelpFormatter):
    """Show switches without a value and only the first spelling of every flag."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.option_strings == ["-h", "--help"]:
            return super()._format_action_invocation(action)
        if action.nargs == "?":
            return action.option_strings[0]
        return f"{action.option_strings[0]} {self._format_args(action, str(action.metavar))}"


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"{text!r} is not valid: give true or false")
    return text.lower() in ("true", "1", "yes")


def _positional_usage(arguments_class: type, names: Sequence[str]) -> str:
    """Return the leading words of a command line as a usage line shows them: ``[MODEL [OUTPUT]]``, ``RUN [RUN ...]``.

    A flag whose default is empty text or an empty list has to be given.
    """
    defaults = {one.name: default_of(one) for one in fields(arguments_class)}
    usage = ""
    for name in reversed(names):
        several = value_type(arguments_class, name).several
        word = name.removesuffix("s").upper() if several else name.upper()
        words = f"{word} [{word} ...]" if several else word
        words = f"{words} {usage}".rstrip()
        usage = words if defaults[name] in ("", []) else f"[{words}]"
    return usage


def build_parser(
    arguments_class: type, program: str, summary: str, *, positionals: Sequence[str] = ()
) -> argparse.ArgumentParser:
    """Build the parser of a command from the fields of its arguments, in the groups that they name.

    Args:
        positionals: flags that the usage line shows as leading words.
    """
    usage = [program, _positional_usage(arguments_class, positionals), "[flags]"]
    parser = _Parser(
        prog=program,
        description=summary,
        usage=" ".join(filter(None, usage)),
        allow_abbrev=False,
        formatter_class=_HelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    groups: dict[str, Any] = {"options": parser}  # argparse's own heading, below which --help stands
    for one in fields(arguments_class):
        title = one.metadata["group"]
        group = groups.setdefault(title, None) or parser.add_argument_group(title)
        groups[title] = group
        _add_flag(group, one, value_type(arguments_class, one.name))
    return parser


def _add_flag(group: Any, one: Field[Any], kind: ValueType) -> None:
    names = [f"--{name}" for name in (one.name, *one.metadata["aliases"])]
    default = default_of(one)
    text = one.metadata["help"].replace("%", "%%")
    if kind.choices:
        text += f": {', '.join(kind.choices)}"
    if "(default" not in text and default not in (None, False, "", []):
        shown = ",".join(map(str, default)) if kind.several else default
        text += f" (default: {str(shown).replace('%', '%%')})"
    if kind.convert is bool:
        group.add_argument(*names, dest=one.name, nargs="?", const=True, type=_boolean, help=text)
        if default is not False:
            off = [name.replace("--", "--no_", 1) for name in names]
            group.add_argument(*off, dest=one.name, action="store_false", help=argparse.SUPPRESS)
        return
    metavar = {int: "N", float: "X"}.get(kind.convert, "VALUE")
    extra: dict[str, Any] = {"nargs": "*" if default else "+", "action": "extend"} if kind.several else {}
    convert = str if kind.is_share else kind.convert  # the arguments read a share themselves
    group.add_argument(*names, dest=one.name, type=convert, metavar=metavar, help=text, **extra)


def parse_flags(
    arguments_class: type[T],
    argv: Sequence[str],
    program: str = "",
    summary: str = "",
    *,
    positionals: Sequence[str] = (),
) -> T:
    """Read flags into a dataclass; ``program``, ``summary`` and ``positionals`` are for ``--help``.

    Raises:
        PrunerError: a flag is unknown (the message names the nearest), lacks its value or has one of another type.
    """
    parser = build_parser(arguments_class, program, summary, positionals=positionals)
    known, unknown = parser.parse_known_args(list(argv))
    if unknown:
        spellings = [option for action in parser._actions for option in action.option_strings]
        raise PrunerError(f"unknown argument {unknown[0]}{_did_you_mean(unknown[0], spellings)}")
    values = vars(known)
    for name, value in values.items():
        if isinstance(value, list):
            values[name] = [
                item for entry in value for item in (split_list(entry) if isinstance(entry, str) else [entry])
            ]
    return arguments_class(**values)
