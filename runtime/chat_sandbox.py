"""The sandbox in which chat templates run; see `headrace.chat`.

jinja2's sandbox keeps a template from reaching Python objects. What it does not stop is a
template that never ends or fills the memory, so every loop body counts its steps here, every
printed expression its characters, and the few operations whose result can be far larger than
their operands are measured before they are done.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from jinja2 import Template, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.exceptions import TemplateError as JinjaError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from headrace.errors import TemplateError

MAX_SECONDS = 2.0
MAX_STEPS = 1_000_000
MAX_CHARS = 1 << 24
MAX_NUMBER = 1 << 64
MAX_WIDTH = 4096


class _Limits(threading.local):
    """What the rendering in this thread has used."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.steps = self.chars = 0
        self.deadline = time.monotonic() + MAX_SECONDS

    def step(self, chars: int = 0) -> str:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise SecurityError(f"the template takes more than {MAX_STEPS} steps")
        if time.monotonic() > self.deadline:
            raise SecurityError(f"the template runs for more than {MAX_SECONDS} s")
        self.count(chars)
        return ""

    def count(self, chars: int) -> None:
        self.chars += chars
        if self.chars > MAX_CHARS:
            raise SecurityError(f"the template writes more than {MAX_CHARS} characters")

    def printed(self, value: Any) -> Any:
        if type(value) is str:
            self.count(len(value))
            return value
        text = str(value)
        self.count(len(text))
        return text


_LIMITS = _Limits()


def _allow(size: int) -> None:
    if size > MAX_CHARS:
        raise SecurityError(f"the template makes a value of more than {MAX_CHARS} items")


def _size(value: Any) -> int:
    return len(value) if isinstance(value, (str, bytes, list, tuple)) else 1


def _width(value: Any) -> None:
    if isinstance(value, int) and value > MAX_WIDTH:
        raise SecurityError(f"the template asks for a field of {value} characters")


def _format(text: Any) -> None:
    if isinstance(text, str) and re.search(r"\d{4}|\*|\{[^}]*\{", text):
        raise SecurityError("the template uses a format with a wide or variable field")


# What a method or filter may cost, checked before it runs: arguments start with the text.
def _check_replace(text: Any, old: Any = "", new: Any = "", *_: Any) -> None:
    if isinstance(text, str) and isinstance(old, str):
        _allow(len(text) + (text.count(old) + 1) * _size(new))


def _check_join(joint: Any, items: Any = (), *_: Any) -> None:
    if isinstance(items, (list, tuple, str, dict, range)):
        _allow(sum(_size(item) for item in items) + len(items) * _size(joint))


def _check_width(_text: Any, *arguments: Any) -> None:
    for argument in arguments:
        _width(argument)


def _check_format(text: Any, *_: Any) -> None:
    _format(text)


_METHODS: dict[str, Callable[..., None]] = {
    "replace": _check_replace,
    "join": _check_join,
    "translate": lambda text, table=(), *_: _allow(
        _size(text) * max(map(_size, table.values()), default=1) if isinstance(table, dict) else 0
    ),
    "format": _check_format,
    "format_map": _check_format,
    **dict.fromkeys(("center", "ljust", "rjust", "zfill", "expandtabs"), _check_width),
}
_FILTERS: dict[str, Callable[..., None]] = {
    "replace": _check_replace,
    "format": _check_format,
    **dict.fromkeys(("center", "indent", "batch", "slice", "round"), _check_width),
}
_UNAVAILABLE_FILTERS = ("pprint", "wordwrap", "urlize", "xmlattr", "random")


class _Generation(Extension):
    """`{% generation %}`: marks the assistant's words for training; nothing to do here."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["*", "**", "+", "%"])

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for concat in list(tree.find_all(nodes.Concat)):  # `a ~ b` must be bounded, too
            concat.nodes = [_call("concat", concat.nodes, concat.lineno)]
        for body in list(tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock))):
            chars = sum(len(data.data) for data in body.find_all(nodes.TemplateData))
            step = _call("step", [nodes.Const(chars)], body.lineno)
            body.body.insert(0, nodes.ExprStmt(step, lineno=body.lineno))
        tree.set_environment(self)
        return tree

    def step(self, chars: int) -> str:
        return _LIMITS.step(chars)

    def concat(self, *values: Any) -> str:
        texts = [str(value) for value in values]
        _allow(sum(map(len, texts)))
        return "".join(texts)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%":
            _format(left)
        elif operator == "**":
            if isinstance(left, int) and isinstance(right, int) and right > 0:
                _allow(left.bit_length() * right)
        elif operator == "+":
            if not isinstance(left, (int, float)):
                _allow(_size(left) + _size(right))
        elif isinstance(left, int) and isinstance(right, int):
            if abs(left) > MAX_NUMBER or abs(right) > MAX_NUMBER:
                raise SecurityError("the template multiplies numbers of more than 64 bits")
        else:
            times = left if isinstance(left, int) else right
            _allow(_size(left) * _size(right) * (times if isinstance(times, int) else 1))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        _LIMITS.step()
        owner = getattr(function, "__self__", None)
        if isinstance(owner, str):
            check = _METHODS.get(getattr(function, "__name__", ""))
            if check is not None:
                check(owner, *args, *kwargs.values())
        return super().call(context, function, *args, **kwargs)


def _call(name: str, arguments: list[Any], line: int) -> nodes.Call:
    function = nodes.EnvironmentAttribute(name)
    return nodes.Call(function, arguments, [], None, None, lineno=line)


def _checked(check: Callable[..., None], apply: Callable[..., Any]) -> Callable[..., Any]:
    def guarded(value: Any, *args: Any, **kwargs: Any) -> Any:
        check(value, *args, *kwargs.values())
        return apply(value, *args, **kwargs)

    return guarded


def _join_filter(value: Any, d: str = "", attribute: Any = None) -> str:
    items = list(value)
    if attribute is not None:
        items = [item[attribute] if isinstance(item, Mapping) else "" for item in items]
    texts = [str(item) for item in items]
    _check_join(d, texts)
    return d.join(texts)


def _raise_exception(message: str) -> None:
    raise JinjaError(message)


def _strftime_now(form: str) -> str:
    _format(form)
    return datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    _width(indent)
    # Unlike jinja2's own, this does not escape HTML: the text is for a model.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, loopcontrols],
        finalize=_LIMITS.printed,
        cache_size=0,
    )
    environment.globals.pop("lipsum")
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    for name in _UNAVAILABLE_FILTERS:
        environment.filters.pop(name)
    for name, check in _FILTERS.items():
        apply = environment.filters[name]
        if getattr(apply, "jinja_pass_arg", None) is None:
            environment.filters[name] = _checked(check, apply)
    environment.filters["replace"] = _checked(_check_replace, lambda s, *a: str(s).replace(*a))
    environment.filters["join"] = _join_filter
    environment.filters["tojson"] = _to_json
    return environment


def compile_template(source: str) -> Template:
    """Compile a template; TemplateError if its syntax is wrong."""
    _LIMITS.reset()
    try:
        return _environment().from_string(source)
    except TemplateSyntaxError as error:
        raise TemplateError(
            f"the chat template is broken at line {error.lineno}: {error.message}; use --raw"
        ) from None
    except Exception as error:
        raise TemplateError(
            f"the chat template cannot be compiled: {_reason(error)}; use --raw"
        ) from None


def render(template: Template, variables: dict[str, Any]) -> str:
    """Run a compiled template within the limits of this module."""
    _LIMITS.reset()
    parts = []
    try:
        for part in template.generate(**variables):
            parts.append(part)
    except Exception as error:
        line = _line(template, error)
        where = f" at line {line}" if line else ""
        raise TemplateError(f"the chat template fails{where}: {_reason(error)}") from None
    return "".join(parts)


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it recurses too deeply"
    return str(error) or type(error).__name__


def _line(template: Template, error: Exception) -> int | None:
    """The template's line, which jinja2 writes into the traceback."""
    found = None
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename in ("<template>", "<unknown>"):
            found = trace.tb_lineno
        trace = trace.tb_next
    return found
