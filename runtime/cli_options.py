"""Options of a command line as a table: parsed directly, and by typer only to help and complain.

Typer's import and application cost 75 ms, which a well-formed command line need not wait for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from headrace.sizes import parse_size

if TYPE_CHECKING:
    from typer import Typer


class Opt(NamedTuple):
    """An option, or an argument when it has no flags; `name` is the keyword of the function.

    A flag that begins with "--no-" makes a bool false. The last argument may be `many`.
    """

    name: str
    kind: Callable[[str], Any]
    default: Any
    help: str
    flags: tuple[str, ...] = ()
    many: bool = False


class Command(NamedTuple):
    """A subcommand: what carries it out, and its options."""

    function: Callable[..., int]
    options: tuple[Opt, ...]


REQUIRED = object()


def is_given(value: Any) -> bool:
    """Whether an option whose default says nothing was given: a 0 was, which equals False."""
    return value is not None and value is not False and value != ()


def bits(text: str) -> tuple[int, ...]:
    """Widths in bits, such as 2,4,8."""
    return tuple(int(part) for part in text.split(","))


def parse(command: Command, arguments: list[str]) -> dict[str, Any] | None:
    """The values of a well-formed command line; None leaves help and errors to typer."""
    by_flag = {flag: option for option in command.options for flag in option.flags}
    positional = [option for option in command.options if not option.flags]
    values: dict[str, Any] = {option.name: option.default for option in command.options}
    rest = iter(arguments)
    try:
        for word in rest:
            flag, equals, value = word.partition("=")
            option = by_flag.get(flag)
            if option is None:
                if (word.startswith("-") and word != "-") or not positional:
                    return None
                option, value = positional[0], word
                if not option.many:
                    positional.pop(0)
            elif option.kind is bool:
                if equals:
                    return None
                value = "" if flag.startswith("--no-") else "yes"
            elif not equals:
                value = next(rest)
            converted = option.kind(value)
            if option.many:
                converted = (*values[option.name], converted)
            values[option.name] = converted
    except (ValueError, StopIteration):
        return None
    return None if any(value is REQUIRED for value in values.values()) else values


def build_app(
    commands: Mapping[str, Command], run: Callable[..., int], version: Callable[[], int]
) -> Typer:
    """The typer application of a table: help, completion and messages on wrong usage.

    Args:
        commands: the table.
        run: called with a command's function and its values; gives the exit code.
        version: prints the version.
    """
    import typer

    app = typer.Typer(no_args_is_help=True, help="Run models on this machine.")

    def show_version(wanted: bool) -> None:
        if wanted:
            raise typer.Exit(run(version, {}))

    shown = typer.Option(
        False, "--version", help="Print the version.", is_eager=True, callback=show_version
    )

    @app.callback()
    def _root(show: bool = shown) -> None:
        pass

    groups: dict[str, Typer] = {}
    for name, command in commands.items():
        group, _, last = name.rpartition(" ")
        if group and group not in groups:
            groups[group] = typer.Typer(no_args_is_help=True)
            app.add_typer(groups[group], name=group, help=f"Commands about {group}.")
        place = groups[group] if group else app
        place.command(last, help=command.function.__doc__)(_typer_function(command, run))
    return app


def _typer_function(command: Command, run: Callable[..., int]) -> Callable[..., None]:
    from inspect import Parameter, Signature

    import typer

    def checked(option: Opt) -> Callable[[Any], Any]:
        def convert(value: Any) -> Any:
            try:
                return option.kind(value) if isinstance(value, str) else value
            except ValueError as error:
                raise typer.BadParameter(str(error)) from error

        return convert

    def call(**values: Any) -> None:
        raise typer.Exit(run(command.function, values))

    parameters = []
    for option in command.options:
        default = ... if option.default is REQUIRED else option.default
        kind: Any = str if option.kind in (parse_size, bits) else option.kind
        extra: dict[str, Any] = {"help": option.help}
        if option.kind in (parse_size, bits):
            metavar = "SIZE" if option.kind is parse_size else "BITS"
            extra |= {"callback": checked(option), "metavar": metavar}
        if option.many:
            kind, default = list[str], []
        elif default is None:
            kind = kind | None
        flags = option.flags
        if any(flag.startswith("--no-") for flag in flags):
            flags = ("/".join(flags),)  # typer's way to write such a pair
        info = (typer.Option if flags else typer.Argument)(default, *flags, **extra)
        parameters.append(
            Parameter(option.name, Parameter.KEYWORD_ONLY, default=info, annotation=kind)
        )
    call.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    return call
