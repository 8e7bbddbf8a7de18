"""What can be broken in a piece of Python, one thing at a time: edits found in the syntax tree."""

from __future__ import annotations

import ast
import copy
from collections.abc import Collection, Iterator
from typing import NamedTuple

OPPOSITES: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
# The same comparison with the other answer where both sides are equal.
AT_THE_EDGE: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
}
SWAPPED: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
}  # fmt: skip
Function = ast.FunctionDef | ast.AsyncFunctionDef


class Mutation(NamedTuple):
    line: int
    function: int | None  # the first line of the function around it, decorators included; None outside functions
    old: str
    new: str
    source: str  # the whole file with the change in it


def mutations(source: str, lines: Collection[int]) -> Iterator[Mutation]:
    """Every way to break one thing that stands on one of these lines (counted from 1), each source compilable once."""
    tree = ast.parse(source)
    seen = {source}
    for place, old, new, function in _edits(tree, None):
        if lines and not any(line in lines for line in range(place.lineno, (place.end_lineno or 0) + 1)):
            continue
        start, stop = _span(source, old)
        text = new if isinstance(new, str) else f"({ast.unparse(new)})"
        whole = source.encode()
        changed = (whole[:start] + text.encode() + whole[stop:]).decode()
        try:
            compile(changed, "changed", "exec")
        except SyntaxError:
            continue
        if changed not in seen:
            seen.add(changed)
            yield Mutation(place.lineno, function, ast.unparse(old), text, changed)


Place = ast.expr | ast.stmt | ast.keyword
# where it stands (what is compared with the changed lines), the node that is replaced, by what, and the function
Edit = tuple[Place, ast.expr | ast.stmt, ast.expr | str, int | None]


def _edits(node: ast.AST, function: int | None) -> Iterator[Edit]:
    if isinstance(node, Function):
        function = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    if isinstance(node, ast.stmt):
        yield from ((node, node, "pass", function) for _ in range(_removable(node)))
    if isinstance(node, ast.expr):
        yield from ((place, node, new, function) for place, new in _broken(node))
    if isinstance(node, ast.If | ast.While | ast.IfExp) and not isinstance(node.test, ast.Compare):
        yield node.test, node.test, _negated(node.test), function
    if isinstance(node, ast.comprehension):
        yield from ((one, one, ast.Constant(True), function) for one in node.ifs)
    # The words of an error and the inside of an f-string are not worth a test each.
    if not isinstance(node, ast.Raise | ast.JoinedStr):
        for child in ast.iter_child_nodes(node):
            yield from _edits(child, function)


def _removable(node: ast.stmt) -> bool:
    """Whether the code without it still says something; a name that is never bound would fail by itself."""
    if isinstance(node, ast.Expr):
        return not isinstance(node.value, ast.Constant)
    if isinstance(node, ast.Assign):
        names = {target.id for target in node.targets if isinstance(target, ast.Name)}
        used = {part.id for part in ast.walk(node.value) if isinstance(part, ast.Name)}
        return not any(isinstance(target, ast.Name | ast.Tuple) for target in node.targets) or bool(names & used)
    return isinstance(node, ast.AugAssign | ast.Raise | ast.Break | ast.Continue | ast.Delete)


def _broken(node: ast.expr) -> Iterator[tuple[Place, ast.expr]]:
    """The expression with one thing in it changed, and the part that the change concerns."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        for table in (OPPOSITES, AT_THE_EDGE):
            if (other := table.get(type(node.ops[0]))) is not None:
                yield node, ast.Compare(node.left, [other()], node.comparators)
    elif isinstance(node, ast.BinOp) and (swapped := SWAPPED.get(type(node.op))) and not _is_text(node):
        yield node, ast.BinOp(node.left, swapped(), node.right)
    elif isinstance(node, ast.BoolOp):
        for place, value in enumerate(node.values):
            rest = node.values[:place] + node.values[place + 1 :]
            yield value, ast.BoolOp(node.op, rest) if len(rest) > 1 else rest[0]
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
        value = not node.value if isinstance(node.value, bool) else node.value + 1
        yield node, ast.Constant(value)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not):
        yield node, node.operand
    elif isinstance(node, ast.Call):
        yield from _calls(node)


def _is_text(node: ast.BinOp) -> bool:
    sides = (node.left, node.right)
    return any(isinstance(side, ast.JoinedStr) or isinstance(getattr(side, "value", None), str) for side in sides)


def _calls(node: ast.Call) -> Iterator[tuple[Place, ast.expr]]:
    for place, argument in enumerate(node.keywords):
        less = copy.copy(node)
        less.keywords = node.keywords[:place] + node.keywords[place + 1 :]
        yield argument, less
    if not node.args and not node.keywords and isinstance(node.func, ast.Attribute):
        yield node, node.func.value
    if len(node.args) > 1:
        less = copy.copy(node)
        less.args = node.args[:-1]
        yield node.args[-1], less


def _negated(node: ast.expr) -> ast.expr:
    return (
        node.operand if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not) else ast.UnaryOp(ast.Not(), node)
    )


def _span(source: str, node: ast.expr | ast.stmt) -> tuple[int, int]:
    """Where the node's bytes start and end in the file."""
    starts = [0]
    for line in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    end_line, end = node.end_lineno or node.lineno, node.end_col_offset or 0
    return starts[node.lineno - 1] + node.col_offset, starts[end_line - 1] + end
