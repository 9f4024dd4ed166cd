"""The sandbox in which chat templates run; see `headrace.chat`.

jinja2's sandbox keeps a template from reaching Python objects. What it does not stop is a
template that never ends or fills the memory, so every loop body and every operation on values
counts as a step here, which looks at the clock, and every printed expression its characters. The
few operations that can take far more time or memory than their operands have items are measured
before they are done, or refused. Compiling is watched in the same way, and runs nothing: jinja2
would evaluate what is constant.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from datetime import datetime
from typing import Any

from jinja2 import Template, TemplateSyntaxError, nodes, pass_context, pass_environment
from jinja2.compiler import CodeGenerator
from jinja2.exceptions import SecurityError
from jinja2.exceptions import TemplateError as JinjaError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import do_unique
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from headrace.errors import TemplateError

MAX_SECONDS = 2.0
MAX_STEPS = 1_000_000
MAX_CHARS = 1 << 22  # and eight times what the caller passed in
MAX_ITEMS = 200_000
MAX_WIDTH = 4096
MAX_PAIRS = 1000  # in what is made a dict of
# Of the source; a template of 10,000 characters has about 1000 nodes and 50 names.
MAX_NODES = 10_000
MAX_NAMES = 500
MAX_CODE_CHARS = 1 << 21


class _Limits(threading.local):
    """What the rendering in this thread has used, and may use."""

    def __init__(self) -> None:
        self.reset()

    def reset(self, given_chars: int = 0) -> None:
        self.steps = self.chars = self.made = 0
        self.max_chars = MAX_CHARS + 8 * given_chars
        self.deadline = time.monotonic() + MAX_SECONDS

    def step(self, chars: int = 0) -> str:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise SecurityError(f"the template takes more than {MAX_STEPS} steps")
        self.look_at_the_clock()
        self.count(chars)
        return ""

    def look_at_the_clock(self) -> None:
        if time.monotonic() > self.deadline:
            raise SecurityError(f"the template runs for more than {MAX_SECONDS} s")

    def count(self, chars: int) -> None:
        self.chars += chars
        if self.chars > self.max_chars:
            raise SecurityError(f"the template writes more than {self.max_chars} characters")

    def make(self, text: str) -> None:
        """Count texts that are made one by one, and may be kept in a list unseen."""
        self.made += len(text)
        if self.made > 16 * self.max_chars:
            raise SecurityError(f"the template makes more than {16 * self.max_chars} characters")

    def allow(self, chars: int) -> None:
        if chars > self.max_chars:
            raise SecurityError(f"the template makes a value of more than {self.max_chars} items")

    def printed(self, value: Any) -> str:
        self.look_at_the_clock()
        text = self.text(value)
        self.count(len(text))
        return text

    def text(self, value: Any) -> str:
        self.weigh(value)
        return value if type(value) is str else str(value)

    def weigh(self, value: Any) -> int:
        """Characters of `value` written out; a list that holds another twice counts it twice."""
        if isinstance(value, (str, bytes)):
            return len(value)
        chars, items, pending = 0, 0, [value]
        while pending:
            value = pending.pop()
            items += 1
            if isinstance(value, (str, bytes)):
                chars += len(value)
            elif isinstance(value, Mapping):
                pending += value
                pending += value.values()
            elif isinstance(value, (list, tuple, set, frozenset)):
                pending += value
            elif isinstance(value, Namespace):
                pending.append(value._Namespace__attrs)
            elif isinstance(value, range):
                chars += 8 * len(value)
            if items + len(pending) > MAX_ITEMS:
                raise SecurityError(f"the template makes a value of more than {MAX_ITEMS} items")
        self.allow(chars + items)
        return chars + items


_LIMITS = _Limits()


def _size(value: Any) -> int:
    return len(value) if isinstance(value, (str, bytes, list, tuple)) else 1


# What a method or filter may cost, checked before it runs. The text comes first.
def _check_width(_text: Any, *arguments: Any) -> None:
    for argument in arguments:
        # Rounding to 10**9 places before the point takes as long as to 10**9 behind it.
        if isinstance(argument, int) and abs(argument) > MAX_WIDTH:
            raise SecurityError(f"the template asks for a field of {argument} characters")


def _check_format(text: Any, *_: Any) -> None:
    if isinstance(text, (str, bytes)):
        text = text if isinstance(text, str) else text.decode("latin-1")
        if re.search(r"\d{4}|\*|\{[^}]*\{", text):
            raise SecurityError("the template uses a format with a wide or variable field")


def _check_replace(text: Any, old: Any = "", new: Any = "", *_: Any) -> None:
    text, old, new = str(text), str(old), str(new)
    _LIMITS.allow(len(text) + text.count(old) * len(new))


def _check_join(joint: Any, items: Any = (), *_: Any) -> None:
    if isinstance(items, Sized):
        _LIMITS.allow(_LIMITS.weigh(items) + len(items) * _size(joint))


def _check_translate(text: Any, table: Any = (), *_: Any) -> None:
    if isinstance(table, dict):
        _LIMITS.allow(len(text) * max(map(_size, table.values()), default=1))


def _check_indent(text: Any, width: Any = 4, *_: Any) -> None:
    _check_width(text, width)
    _LIMITS.allow(str(text).count("\n") * (_size(width) if isinstance(width, str) else MAX_WIDTH))


def _check_int(text: Any, *_: Any) -> None:
    if isinstance(text, (str, bytes)) and len(text) > MAX_WIDTH:
        raise SecurityError(f"the template reads a number of {len(text)} characters")


def _check_sum(_items: Any, *arguments: Any) -> None:
    # Joining lists one by one takes the square of their number.
    if any(isinstance(a, Iterable) and not isinstance(a, str) for a in arguments):
        raise SecurityError("the template adds up lists")


def _check_pairs(*arguments: Any) -> None:
    # Numbers can be chosen so that a dict compares each with all others.
    for argument in arguments:
        pairs = isinstance(argument, (list, tuple)) and len(argument) <= MAX_PAIRS
        if not (pairs or isinstance(argument, Mapping)):
            raise SecurityError(f"the template makes a dict of more than {MAX_PAIRS} pairs")


_METHODS: dict[str, Callable[..., None]] = {
    "replace": _check_replace,
    "join": _check_join,
    "translate": _check_translate,
    **dict.fromkeys(("center", "ljust", "rjust", "zfill", "expandtabs", "to_bytes"), _check_width),
}
_FILTERS: dict[str, Callable[..., None]] = {
    "replace": _check_replace,
    "format": _check_format,
    "indent": _check_indent,
    "int": _check_int,
    "sum": _check_sum,
    **dict.fromkeys(("center", "batch", "slice", "round"), _check_width),
}
# Makers of what may be slow to use: huge numbers, and dicts whose keys collide.
_UNAVAILABLE_METHODS = ("from_bytes", "fromkeys")
_UNAVAILABLE_FILTERS = ("pprint", "wordwrap", "urlize", "xmlattr", "random")


class _Generation(Extension):
    """`{% generation %}`: marks the assistant's words for training; nothing to do here."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Clock(Extension):
    """Looks at the clock at each token that is parsed."""

    def filter_stream(self, stream: Any) -> Any:
        for token in stream:
            _LIMITS.look_at_the_clock()
            yield token


class _Generator(CodeGenerator):
    """Looks at the clock at each node that becomes code, and bounds the code."""

    n_chars = 0

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        _LIMITS.look_at_the_clock()
        return super().visit(node, *args, **kwargs)

    def write(self, x: str) -> None:
        self.n_chars += len(x)
        if self.n_chars > MAX_CODE_CHARS:
            raise SecurityError("it makes too much code")
        _LIMITS.look_at_the_clock()
        super().write(x)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["*", "**", "+", "-", "/", "//", "%"])
    code_generator_class = _Generator

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _check_tree(tree)
        for concat in list(tree.find_all(nodes.Concat)):
            concat.nodes = [_call("joined", concat.nodes, concat.lineno)]
        _weigh(tree)
        loops: list[Any] = list(tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)))
        for body in loops:
            chars = sum(len(data.data) for data in body.find_all(nodes.TemplateData))
            step = _call("step", [nodes.Const(chars)], body.lineno)
            body.body.insert(0, nodes.ExprStmt(step, lineno=body.lineno))
        tree.set_environment(self)
        return tree

    def step(self, chars: int) -> str:
        return _LIMITS.step(chars)

    def compared(self, value: Any) -> Any:
        _LIMITS.step()
        return value

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in _UNAVAILABLE_METHODS and super().is_safe_attribute(obj, attr, value)

    def joined(self, *values: Any) -> str:
        texts = [_LIMITS.text(value) for value in values]
        _LIMITS.allow(sum(map(len, texts)))
        return "".join(texts)

    def weighed(self, value: Any) -> Any:
        _LIMITS.weigh(value)
        return value

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
        if numbers:
            bits = [value.bit_length() if isinstance(value, int) else 0 for value in (left, right)]
            if operator == "**" and isinstance(right, int):
                bits = [bits[0] * abs(right)]
            if sum(bits) > MAX_WIDTH:
                raise SecurityError(f"the template makes a number of more than {MAX_WIDTH} bits")
        else:
            sizes = _LIMITS.weigh(left), _LIMITS.weigh(right)
            if operator == "%":
                _check_format(left)
            elif operator == "*":
                size = sizes[1] if isinstance(left, int) else sizes[0]
                times = left if isinstance(left, int) else right
                _LIMITS.allow(size * times if isinstance(times, int) else 0)
            else:
                _LIMITS.allow(sum(sizes))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        _LIMITS.step()
        _LIMITS.weigh(args)
        _LIMITS.weigh(kwargs)
        if function is dict or function is Namespace:
            _check_pairs(*args)
        owner = getattr(function, "__self__", None)
        if isinstance(owner, (str, bytes, int)):
            check = _METHODS.get(getattr(function, "__name__", ""))
            if check is not None:
                check(owner, *args, *kwargs.values())
        return self.weighed(super().call(context, function, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _check_format(value.__self__)
        return wrapped


def _call(name: str, arguments: list[Any], line: int) -> nodes.Call:
    function = nodes.EnvironmentAttribute(name)
    return nodes.Call(function, arguments, [], None, None, lineno=line)


def _check_tree(tree: nodes.Template) -> None:
    """Refuse what would take long to compile: some of that takes the names times the nodes."""
    n_nodes, names = 0, set()
    for node in tree.find_all(nodes.Node):
        n_nodes += 1
        names.add(getattr(node, "name", None))
        if isinstance(node, nodes.FromImport):
            names.update(map(str, node.names))
    if n_nodes > MAX_NODES or len(names) > MAX_NAMES:
        raise SecurityError(
            f"it has {n_nodes} parts and {len(names)} names, more than {MAX_NODES} and {MAX_NAMES}"
        )


def _weigh(tree: nodes.Node) -> None:
    """Weigh each list, tuple and dict as it is made: doubled often enough, a pair is endless.

    Comparisons and slices count as steps: they look at all of a list.
    """
    for field, value in tree.iter_fields():
        children = value if isinstance(value, list) else [value]
        for index, child in enumerate(children):
            if not isinstance(child, nodes.Node):
                continue
            _weigh(child)
            if isinstance(child, (nodes.List, nodes.Dict, nodes.Tuple)):
                watch = "weighed" if getattr(child, "ctx", "load") == "load" else ""
            elif isinstance(child, nodes.Compare) or (
                isinstance(child, nodes.Getitem) and isinstance(child.arg, nodes.Slice)
            ):
                watch = "compared"
            else:
                watch = ""
            if watch:
                watched = _call(watch, [child], child.lineno)
                if isinstance(value, list):
                    value[index] = watched
                else:
                    setattr(tree, field, watched)


def _bounded(name: str, apply: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that is measured before and after."""
    wants = getattr(apply, "jinja_pass_arg", None)
    first = 0 if wants is None else 1
    check = _FILTERS.get(name)

    def run(*args: Any, **kwargs: Any) -> Any:
        _LIMITS.step()
        values = (*args[first:], *kwargs.values())
        _LIMITS.weigh(values)
        if check is not None:
            check(*values)
        result = apply(*args, **kwargs)
        _LIMITS.look_at_the_clock()
        _LIMITS.weigh(result)
        if isinstance(result, str):
            _LIMITS.make(result)
        return result

    if wants is not None:
        run.jinja_pass_arg = wants  # type: ignore[attr-defined]
    return run


def _stepped(apply: Callable[..., Any]) -> Callable[..., Any]:
    """A test that counts as a step: filters apply them to every item of a list."""

    def run(*args: Any, **kwargs: Any) -> Any:
        _LIMITS.step()
        return apply(*args, **kwargs)

    if (wants := getattr(apply, "jinja_pass_arg", None)) is not None:
        run.jinja_pass_arg = wants  # type: ignore[attr-defined]
    return run


@pass_context
def _printed(_context: Any, value: Any) -> str:
    # A function of the context is never called by the compiler: what it would print once and for
    # all, a loop prints many times without counting it.
    return _LIMITS.printed(value)


@pass_environment
def _unique_filter(environment: Any, items: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
    def one_by_one() -> Iterator[Any]:
        for item in items:
            _LIMITS.look_at_the_clock()  # as with dicts, items may collide
            yield item

    unique: Iterator[Any] = do_unique(environment, one_by_one(), *args, **kwargs)
    return unique


def _join_filter(items: Any, d: str = "", attribute: Any = None) -> str:
    items = list(items)
    if attribute is not None:
        items = [item.get(attribute, "") if isinstance(item, Mapping) else "" for item in items]
    texts = [_LIMITS.text(item) for item in items]
    _check_join(d, texts)
    return d.join(texts)


def _raise_exception(message: str) -> None:
    raise JinjaError(message)


def _strftime_now(form: str) -> str:
    _check_format(form)
    return datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    _check_width(value, indent)
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
        extensions=[_Generation, _Clock, loopcontrols],
        finalize=_printed,
        cache_size=0,
        optimized=False,
    )
    environment.globals.pop("lipsum")
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    filters = environment.filters
    for name in _UNAVAILABLE_FILTERS:
        filters.pop(name)
    filters["tojson"] = _to_json
    filters["join"] = _join_filter
    filters["unique"] = _unique_filter
    filters["replace"] = lambda text, *arguments: str(text).replace(*arguments)
    for name, apply in filters.items():
        filters[name] = _bounded(name, apply)
    tests: dict[str, Any] = environment.tests
    for name, apply in tests.items():
        tests[name] = _stepped(apply)
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
    parts = []
    try:
        _LIMITS.reset(_given_chars(variables))
        for part in template.generate(**variables):
            parts.append(part)
    except Exception as error:
        line = _line(template, error)
        where = f" at line {line}" if line else ""
        raise TemplateError(f"the chat template fails{where}: {_reason(error)}") from None
    return "".join(parts)


def _given_chars(variables: dict[str, Any]) -> int:
    return sum(len(str(value)) for value in variables.values())


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
