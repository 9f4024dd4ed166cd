"""From a kernel's syntax tree to LLVM: one walk, in which callees are inlined.

A kernel is a plain Python function over the markers of `headrace.targets.simd` and numbers. What is
known at compile time (constants, what a closure holds, arithmetic on these) is computed here, and a
branch on it leaves nothing of the other side. Numbers have Numba's types and arithmetic
(`headrace.targets.scalars`), so a kernel means what it would mean to `numba.njit`.

A name stands for a value of LLVM as long as control is straight. Where it joins (behind an `if`, at
the head of a loop) names that were assigned lie on the stack, from where LLVM brings them to
registers. At the head of a loop a name has one type. What has a value on some of the ways only, or
first gets one within a loop, has none behind it: to read it there is an error. Loops count up: a
step that is not known is taken to be positive, as the number of threads is.
"""

from __future__ import annotations

import ast
import functools
import operator
import types as python_types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import llvmlite.ir as ir
from numba.core import types

from headrace.targets import lowering, scalars, syntax
from headrace.targets.table import symbol_of
from headrace.targets.walk import (
    KERNEL,
    Binding,
    Heads,
    Known,
    Path,
    Place,
    Value,
    Walk,
    is_number,
    parts_of,
    same,
)

_WORD = ir.IntType(32)
_BINARY: dict[type[ast.operator], Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.LShift: operator.lshift,
    ast.RShift: operator.rshift,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.BitXor: operator.xor,
}
_UNARY: dict[type[ast.unaryop], Any] = {ast.USub: operator.neg, ast.Invert: operator.invert}
_COMPARE: dict[type[ast.cmpop], Any] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}

_BUILTINS: dict[str, Any] = {"float": float, "int": int, "min": min, "max": max, "len": len}


def _operator(known: Mapping[Any, Any], op: ast.AST, node: ast.AST) -> Any:
    if type(op) not in known:
        raise TypeError(f"kernels have no operator {type(op).__name__}: {ast.unparse(node)}")
    return known[type(op)]


class _Again(Exception):
    """What a name is at the head of a loop was found at its end; `Walk.heads` knows it now."""


class _NoKernel(TypeError):
    """What is wrong with a function, and where."""


class _Call:
    """One function at one place where it is called."""

    def __init__(
        self, walk: Walk, fn: Callable[..., Any], arguments: Sequence[Binding], path: Path
    ) -> None:
        self.path = path
        self.walk = walk
        self.fn = fn
        self.tree = syntax.tree_of(fn)
        self.body = syntax.body_of(self.tree)
        taken = self.tree.args
        if taken.posonlyargs or taken.kwonlyargs or taken.vararg or taken.kwarg:
            raise TypeError(f"{fn.__name__}: kernels take plain arguments only")
        names = [one.arg for one in taken.args]
        defaults = [Known(value) for value in fn.__defaults__ or ()]
        missing = len(names) - len(arguments)
        if not 0 <= missing <= len(defaults):
            raise TypeError(f"{fn.__name__} takes {len(names)} arguments, not {len(arguments)}")
        given = [*arguments, *defaults[len(defaults) - missing :]]
        self.scope: dict[str, Binding] = dict(zip(names, given, strict=True))
        self.alive = True  # control gets here
        self.returned: list[tuple[ir.Block, Binding]] = []
        cells = zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True)
        self.free = {name: cell.cell_contents for name, cell in cells}

    def result(self) -> Binding:
        """Write the function here; what it returns."""
        self.statements(self.body)
        if not self.returned:
            return Known(None)
        b = self.walk.b
        if not self.alive and len(self.returned) == 1:
            block, binding = self.returned[0]
            b.position_at_end(block)
            return binding
        ends = list(self.returned)
        if self.alive:
            ends.append((b.block, Known(None)))
        blocks, bindings = [block for block, _ in ends], [one for _, one in ends]
        return self._join(blocks, bindings, self.walk.block("returned"))

    # ---- names ------------------------------------------------------------------------------

    def lookup(self, name: str) -> Binding:
        if name in self.scope:
            found = self.scope[name]
            return self.walk.value(found) if isinstance(found, Place) else found
        if name in self.fn.__code__.co_varnames or name in self.fn.__code__.co_cellvars:
            raise TypeError(f"{name} has no value here, or has one on some of the ways only")
        if name in self.free:
            return Known(self.free[name])
        if name in self.fn.__globals__:
            return Known(self.fn.__globals__[name])
        if name in _BUILTINS:
            return Known(_BUILTINS[name])
        raise TypeError(f"{name} has no value here")

    def assign(self, target: ast.expr, binding: Binding) -> None:
        if isinstance(target, ast.Tuple):
            parts = parts_of(binding)
            if len(parts) != len(target.elts):
                raise TypeError(f"{len(parts)} values for {ast.unparse(target)}")
            for one, part in zip(target.elts, parts, strict=True):
                self.assign(one, part)
            return
        if not isinstance(target, ast.Name):
            raise TypeError(f"a kernel assigns names, not {ast.unparse(target)}")
        self.scope[target.id] = binding

    # ---- statements -------------------------------------------------------------------------

    def statements(self, nodes: Sequence[ast.stmt]) -> None:
        for node in nodes:
            if not self.alive:
                return
            method = getattr(self, f"_{type(node).__name__}", None)
            try:
                if method is None:
                    text = ast.unparse(node).splitlines()[0]
                    raise TypeError(f"kernels have no {type(node).__name__}: {text}")
                method(node)
            except (_Again, _NoKernel):
                raise
            except Exception as error:
                place = f"{self.fn.__module__}.{self.fn.__qualname__}"
                raise _NoKernel(f"{place}, line {node.lineno}: {error}") from error

    def _Pass(self, node: ast.Pass) -> None:
        del node

    def _Expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Constant):
            self.expression(node.value)

    def _Assign(self, node: ast.Assign) -> None:
        binding = self.expression(node.value)
        for target in node.targets:
            self.assign(target, binding)

    def _AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.assign(node.target, self.expression(node.value))

    def _AugAssign(self, node: ast.AugAssign) -> None:
        before = self.expression(ast.Name(ast.unparse(node.target), ast.Load()))
        op = _operator(_BINARY, node.op, node)
        binding = self.walk.operate(op, before, self.expression(node.value))
        self.assign(node.target, binding)

    def _Return(self, node: ast.Return) -> None:
        binding = Known(None) if node.value is None else self.expression(node.value)
        self.returned.append((self.walk.b.block, binding))
        self.alive = False

    def _If(self, node: ast.If) -> None:
        truth = self.walk.truth(self.expression(node.test))
        if isinstance(truth, Known):
            self.statements(node.body if truth.value else node.orelse)
            return
        b = self.walk.b
        yes, no, behind = (self.walk.block(name) for name in ("then", "else", "behind"))
        b.cbranch(truth, yes, no)
        before = self.scope
        ends: list[ir.Block] = []
        scopes: list[dict[str, Binding]] = []
        for block, nodes in ((yes, node.body), (no, node.orelse)):
            b.position_at_end(block)
            self.scope, self.alive = dict(before), True
            self.statements(nodes)
            if self.alive:
                ends.append(b.block)
                scopes.append(self.scope)
        self.alive = bool(ends)
        if not ends:
            self.walk.function.basic_blocks.remove(behind)
            return
        b.position_at_end(behind)
        self.scope = scopes[0]
        if len(scopes) == 2:
            self.scope = dict(before)
            for name in syntax.assigned(*node.body, *node.orelse):
                self.scope.pop(name, None)
                if not all(name in scope for scope in scopes):
                    continue
                joined = self._joined(ends, [scope[name] for scope in scopes])
                if joined is not None:
                    self.scope[name] = joined
        for end in ends:
            with self.walk.at(end):
                b.branch(behind)

    def _joined(self, ends: Sequence[ir.Block], bindings: Sequence[Binding]) -> Binding | None:
        """What a name stands for where ways meet, stored where they end; None: nothing common."""
        walk, first = self.walk, bindings[0]
        if all(same(first, one) for one in bindings):
            return first
        if not all(is_number(one) for one in bindings if isinstance(one, Known)):
            return None
        kinds = [scalars.type_of(v.value) if isinstance(v, Known) else v.type for v in bindings]
        common: types.Type | None = kinds[0]
        for kind in kinds[1:]:
            common = None if common is None else scalars.common_type(common, kind)
        if common is None:
            return None
        place = walk.stack(common)
        for end, one in zip(ends, bindings, strict=True):
            with walk.at(end):
                walk.store(one, place)
        return place

    def _join(
        self, ends: Sequence[ir.Block], bindings: Sequence[Binding], behind: ir.Block
    ) -> Binding:
        """As `_joined`, of what must have a value; goes on behind the ends."""
        if all(isinstance(one, Known) and isinstance(one.value, tuple) for one in bindings):
            parts = zip(*(parts_of(one) for one in bindings), strict=True)
            joined = [self._joined(ends, part) for part in parts]
            found: Binding | None = None if None in joined else Known(tuple(joined))
        else:
            found = self._joined(ends, bindings)
        if found is None:
            raise TypeError(f"no common type of {', '.join(str(one) for one in bindings)}")
        for end in ends:
            with self.walk.at(end):
                self.walk.b.branch(behind)
        self.walk.b.position_at_end(behind)
        return self._loaded(found)

    def _loaded(self, binding: Binding) -> Binding:
        if isinstance(binding, Known) and isinstance(binding.value, tuple):
            return Known(tuple(self._loaded(one) for one in parts_of(binding)))
        return self.walk.value(binding) if isinstance(binding, Place) else binding

    @contextmanager
    def _loop(self, node: ast.For | ast.While, head: ir.Block) -> Iterator[None]:
        """Names that the loop assigns lie on the stack at its head, and so behind it."""
        if node.orelse:
            raise TypeError("loops of kernels have no else")
        walk = self.walk
        places: dict[str, Place] = {}
        starts: dict[str, types.Type] = {}
        for name in syntax.assigned(node):
            if name in self.scope:
                starts[name] = walk.value(self.scope[name]).type
                kind = walk.heads.get((self.path, node, name, starts[name]), starts[name])
                if kind is None:
                    del self.scope[name]
                    continue
                places[name] = walk.stack(kind)
                walk.store(self.scope[name], places[name])
        self.scope |= places
        before = dict(self.scope)
        walk.b.branch(head)
        walk.b.position_at_end(head)
        yield
        if not self.alive:
            raise TypeError("a loop of a kernel does not return")
        now = {name: walk.value(self.scope[name]) for name in places if name in self.scope}
        for name, place in places.items():
            kind = now[name].type if name in now else None
            common = None if kind is None else scalars.common_type(kind, place.type)
            if common != place.type:
                walk.heads[self.path, node, name, starts[name]] = common
                raise _Again
            if self.scope[name] != place:
                walk.store(now[name], place)
        walk.b.branch(head)
        self.scope = before

    def _While(self, node: ast.While) -> None:
        walk, b = self.walk, self.walk.b
        head, body, behind = (walk.block(name) for name in ("while", "body", "behind"))
        with self._loop(node, head):
            truth = walk.truth(self.expression(node.test))
            if isinstance(truth, Known):
                truth = ir.Constant(ir.IntType(1), int(truth.value))
            b.cbranch(truth, body, behind)
            b.position_at_end(body)
            self.statements(node.body)
        b.position_at_end(behind)

    def _For(self, node: ast.For) -> None:
        walk, b = self.walk, self.walk.b
        start, stop, step = self._range(node.iter)
        if not isinstance(node.target, ast.Name):
            raise TypeError(f"a loop of a kernel counts one name, not {ast.unparse(node.target)}")
        count = walk.stack(types.int64)
        walk.store(start, count)
        compare = "<"
        if isinstance(start, Known) and isinstance(stop, Known) and isinstance(step, Known):
            # To where it ends exactly: of two turns with "<" LLVM makes a flag and a choice between
            # constants, and keeps what is summed on the stack.
            turns = range(start.value, stop.value, step.value)
            stop, compare = Known(start.value + len(turns) * step.value), "!="
        last, by = walk.value(stop), walk.value(step)
        head, body, behind = (walk.block(name) for name in ("for", "body", "behind"))
        with self._loop(node, head):
            now = walk.value(count)
            b.cbranch(b.icmp_signed(compare, now.value, last.value), body, behind)
            b.position_at_end(body)
            self.scope[node.target.id] = now
            self.statements(node.body)
            if self.alive:
                b.store(b.add(now.value, by.value, flags=["nsw"]), *count.places)
        b.position_at_end(behind)

    def _range(self, node: ast.expr) -> tuple[Binding, Binding, Binding]:
        is_range = isinstance(node, ast.Call) and ast.unparse(node.func) == "range"
        if not is_range or not isinstance(node, ast.Call):
            raise TypeError(f"kernels loop over range(...), not {ast.unparse(node)}")
        given = [self.expression(one) for one in node.args]
        for one in given:
            if (kind := self.walk.value(one).type) != types.int64:
                raise TypeError(f"{ast.unparse(node)} counts by {kind}")
        start = Known(0) if len(given) == 1 else given[0]
        step = given[2] if len(given) == 3 else Known(1)
        if isinstance(step, Known) and step.value <= 0:
            raise TypeError(f"loops of kernels count up, unlike {ast.unparse(node)}")
        return start, given[0] if len(given) == 1 else given[1], step

    # ---- expressions ------------------------------------------------------------------------

    def expression(self, node: ast.expr) -> Binding:
        method = getattr(self, f"_{type(node).__name__}", None)
        if method is None:
            raise TypeError(f"kernels have no {type(node).__name__}: {ast.unparse(node)}")
        found: Binding = method(node)
        return found

    def _Constant(self, node: ast.Constant) -> Binding:
        return Known(node.value)

    def _Name(self, node: ast.Name) -> Binding:
        return self.lookup(node.id)

    def _Tuple(self, node: ast.Tuple) -> Binding:
        return Known(tuple(self.expression(one) for one in node.elts))

    def _BinOp(self, node: ast.BinOp) -> Binding:
        op = _operator(_BINARY, node.op, node)
        return self.walk.operate(op, self.expression(node.left), self.expression(node.right))

    def _UnaryOp(self, node: ast.UnaryOp) -> Binding:
        operand = self.expression(node.operand)
        if not isinstance(node.op, ast.Not):
            return self.walk.operate(_operator(_UNARY, node.op, node), operand)
        return self._not(operand)

    def _not(self, binding: Binding) -> Binding:
        truth = self.walk.truth(binding)
        if isinstance(truth, Known):
            return Known(not truth.value)
        return Value(self.walk.b.not_(truth), types.boolean)

    def _Compare(self, node: ast.Compare) -> Binding:
        if len(node.ops) != 1:
            raise TypeError(f"kernels compare two at a time: {ast.unparse(node)}")
        left, right = self.expression(node.left), self.expression(node.comparators[0])
        if isinstance(node.ops[0], ast.In | ast.NotIn):
            cases = [self.walk.operate(operator.eq, left, one) for one in parts_of(right)]
            found = self._any(cases)
            return self._not(found) if isinstance(node.ops[0], ast.NotIn) else found
        return self.walk.operate(_COMPARE[type(node.ops[0])], left, right)

    def _any(self, cases: Sequence[Binding]) -> Binding:
        truths = [self.walk.truth(case) for case in cases]
        if any(isinstance(one, Known) and one.value for one in truths):
            return Known(True)
        open_cases = [one for one in truths if not isinstance(one, Known)]
        if not open_cases:
            return Known(False)
        return Value(functools.reduce(self.walk.b.or_, open_cases), types.boolean)

    def _BoolOp(self, node: ast.BoolOp) -> Binding:
        """`and` and `or`: what decides first, as in Python, of what is true or false."""
        ends_with = isinstance(node.op, ast.Or)
        walk, b = self.walk, self.walk.b
        place, behind = None, None
        for i, one in enumerate(node.values):
            found = self.expression(one)
            if not isinstance(found, Known) and found.type != types.boolean:
                raise TypeError(f"{ast.unparse(one)} is {found.type}: compare it with 0")
            truth = walk.truth(found)
            is_last = i == len(node.values) - 1
            if isinstance(truth, Known):
                if truth.value != ends_with and not is_last:
                    continue
                if place is None:
                    return found
                truth = ir.Constant(ir.IntType(1), int(truth.value))
                is_last = True
            if place is None:
                if is_last:
                    return Value(truth, types.boolean)
                place, behind = walk.stack(types.boolean), walk.block("decided")
            b.store(truth, *place.places)
            if is_last:
                break
            on = walk.block("next")
            b.cbranch(truth, *((behind, on) if ends_with else (on, behind)))
            b.position_at_end(on)
        if place is None:
            return Known(not ends_with)
        b.branch(behind)
        b.position_at_end(behind)
        return walk.value(place)

    def _IfExp(self, node: ast.IfExp) -> Binding:
        truth = self.walk.truth(self.expression(node.test))
        if isinstance(truth, Known):
            return self.expression(node.body if truth.value else node.orelse)
        b, found, ends = self.walk.b, [], []
        blocks = [self.walk.block(name) for name in ("then", "else")]
        b.cbranch(truth, *blocks)
        for block, one in zip(blocks, (node.body, node.orelse), strict=True):
            b.position_at_end(block)
            found.append(self.expression(one))
            ends.append(b.block)
        return self._join(ends, found, self.walk.block("behind"))

    def _Call(self, node: ast.Call) -> Binding:
        fn = self.expression(node.func)
        if node.keywords:
            raise TypeError(f"{ast.unparse(node.func)}: pass arguments by position")
        arguments: list[Binding] = []
        for one in node.args:
            if isinstance(one, ast.Starred):
                arguments += parts_of(self.expression(one.value))
            else:
                arguments.append(self.expression(one))
        if not isinstance(fn, Known) or not callable(fn.value):
            raise TypeError(f"{ast.unparse(node.func)} is no function")
        if fn.value in lowering.MEANINGS:
            return self.walk.marker(fn.value, arguments)
        if isinstance(fn.value, python_types.FunctionType):
            return _Call(self.walk, fn.value, arguments, (*self.path, node)).result()
        known = [one.value for one in arguments if isinstance(one, Known)]
        if len(known) < len(arguments):
            raise TypeError(f"{ast.unparse(node)} is no constant")
        return Known(fn.value(*known))  # float("inf")


def translate(fn: Callable[..., Any], name: str) -> ir.Module:
    """A module with one function, `symbol_of(name)`: void (args, thread, n_threads).

    Or one of words (`headrace.targets.simd.of_words`). Call it within
    `headrace.targets.lowering.lowering_for`.

    Raises:
        TypeError: the function is no kernel; the message says where and why.
    """
    words = fn.__dict__.get("words", 0)
    kinds: list[types.Type] = [lowering.PTR, types.int64, types.int64]
    if words:
        kinds = [lowering.INT32] * words
    signature = ir.FunctionType(_WORD, [_WORD] * words) if words else KERNEL
    heads: Heads = {}
    while True:
        walk = Walk(symbol_of(name), heads, signature)
        given = [Value(*one) for one in zip(walk.function.args, kinds, strict=True)]
        try:
            result = _Call(walk, fn, given, ()).result()
        except _Again:
            continue
        if not words:
            walk.finish()
        elif isinstance(result, Value) and result.type == lowering.INT32:
            walk.finish(result)
        else:
            raise TypeError(f"{fn.__name__} returns no int32")
        return walk.module
