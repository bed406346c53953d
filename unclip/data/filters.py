"""Filters on what is known of samples: `aesthetic >= 5 and width >= 256 and language in ["en"]`."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Column = NDArray[Any]
Mask = NDArray[np.bool_]

COMPARISONS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Lt: np.less,
    ast.LtE: np.less_equal,
    ast.Gt: np.greater,
    ast.GtE: np.greater_equal,
    ast.Eq: np.equal,
    ast.NotEq: np.not_equal,
}
LONGEST_VALUE = 64
"""Keys with texts longer than this (captions, addresses) cannot be filtered by."""
GRAMMAR = "compare keys with numbers or texts by < <= > >= == != in, joined by and, or, not"


class Filter:
    """A filter of samples, by columns of values.

    It is written as a Python expression of keys (dotted where the json is nested), numbers, texts,
    lists of these, comparisons, `and`, `or` and `not`; nothing else is understood, and nothing is
    run.  A sample that lacks a key fails every comparison with it.  True and False are 1 and 0.

    Raises:
        ValueError: the expression is none of these.
    """

    def __init__(self, expression: str) -> None:
        self.expression = expression
        self.names: set[str] = set()
        """The keys that it compares."""
        try:
            self._tree = ast.parse(expression.strip(), mode="eval").body
        except SyntaxError as error:
            raise self._error(expression) from error
        self._mask(self._tree, {}, 0)  # finds what is not understood, and the names

    def __call__(self, columns: Mapping[str, Column], length: int) -> Mask:
        """Which of `length` samples pass, bool [length].

        `columns` are float64 [length] with NaN, or texts [length] with "", where there is no value.
        """
        return self._mask(self._tree, columns, length)

    def check_names(self, known: Collection[str], source: str) -> None:
        """Raise ValueError if the filter names a key that is not among those of the source."""
        for name in sorted(self.names - set(known)):
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose among {sorted(known)}"
            raise ValueError(f"where must name keys of {source}; got {name!r}: {hint}")

    def _error(self, part: str) -> ValueError:
        return ValueError(
            f"where must be a comparison of keys; got {part!r} in {self.expression!r}: {GRAMMAR}"
        )

    def _mask(self, node: ast.expr, columns: Mapping[str, Column], length: int) -> Mask:
        if isinstance(node, ast.BoolOp):
            join = np.logical_and if isinstance(node.op, ast.And) else np.logical_or
            return join.reduce([self._mask(value, columns, length) for value in node.values])
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return ~self._mask(node.operand, columns, length)
        if isinstance(node, ast.Compare):
            passed = np.ones(length, dtype=bool)
            sides = [node.left, *node.comparators]
            for operator, left, right in zip(node.ops, sides, sides[1:], strict=False):
                passed &= self._compare(operator, left, right, columns, length)
            return passed
        raise self._error(ast.unparse(node))

    def _compare(
        self,
        operator: ast.cmpop,
        left: ast.expr,
        right: ast.expr,
        columns: Mapping[str, Column],
        length: int,
    ) -> Mask:
        if isinstance(operator, (ast.In, ast.NotIn)):
            if not isinstance(right, (ast.List, ast.Tuple, ast.Set)):
                raise self._error(ast.unparse(right))
            among = np.zeros(length, dtype=bool)
            for item in right.elts:
                among |= self._compare(ast.Eq(), left, item, columns, length)
            there = self._there(left, columns, length)
            return among if isinstance(operator, ast.In) else ~among & there
        compare = COMPARISONS.get(type(operator))
        if compare is None:
            raise self._error(ast.unparse(ast.Compare(left, [operator], [right])))
        values = [self._value(side, columns) for side in (left, right)]
        if length == 0 or any(value is None for value in values):
            return np.zeros(length, dtype=bool)
        if any(_is_number(value) for value in values):
            values = [_to_numbers(value) for value in values]
        there = self._there(left, columns, length) & self._there(right, columns, length)
        return np.broadcast_to(compare(*values), (length,)) & there

    def _value(self, node: ast.expr, columns: Mapping[str, Column]) -> Any:
        """A column or a constant; None for a key that these samples lack."""
        if (name := _dotted(node)) is not None:
            self.names.add(name)
            return columns.get(name)
        try:
            constant = ast.literal_eval(node)
        except ValueError:
            constant = None
        if not isinstance(constant, (int, float, str)):
            raise self._error(ast.unparse(node))
        return constant

    def _there(self, node: ast.expr, columns: Mapping[str, Column], length: int) -> Mask:
        name = _dotted(node)
        if name is None:
            return np.ones(length, dtype=bool)
        column = columns.get(name)
        if column is None:
            return np.zeros(length, dtype=bool)
        return column != "" if column.dtype.kind == "U" else ~np.isnan(column)


def not_too_long(max_aspect: float, columns: Mapping[str, Column], length: int) -> Mask:
    """Which of `length` samples are not known, by `width` and `height`, to be longer than
    `max_aspect` times their shorter side; bool [length]."""
    if not columns.keys() >= {"width", "height"}:
        return np.ones(length, dtype=bool)
    sides = np.stack([_to_numbers(columns[name]) for name in ("width", "height")])
    return ~(sides.max(axis=0) > max_aspect * sides.min(axis=0))  # unknown is NaN, and passes


def _dotted(node: ast.expr) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (prefix := _dotted(node.value)) is not None:
        return f"{prefix}.{node.attr}"
    return None


def _is_number(value: Any) -> bool:
    return not isinstance(value, str) and np.asarray(value).dtype.kind in "biuf"


def _to_numbers(value: Any) -> Any:
    """Numbers that were written as texts count as numbers; other texts are NaN."""
    if _is_number(value):
        return value

    def number(text: str) -> float:
        try:
            return float(text)
        except ValueError:
            return float("nan")

    return np.array([number(text) for text in np.atleast_1d(value)])


def scalars(value: Any, prefix: str = "") -> Iterator[tuple[str, float | str]]:
    """The dotted keys and values of all numbers, booleans and texts in a json value."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from scalars(item, f"{prefix}.{name}" if prefix else name)
    elif isinstance(value, str) or (isinstance(value, (int, float)) and abs(value) < 1e300):
        yield prefix, value


def columns_of(rows: Sequence[Mapping[str, float | str]]) -> dict[str, Column]:
    """Columns of all keys in rows of values, as `Filter` takes them."""
    columns: dict[str, Column] = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        if not any(isinstance(value, str) for value in values):
            columns[name] = np.array(values, dtype=np.float64)  # None becomes NaN
        elif max(len(str(value)) for value in values) <= LONGEST_VALUE:
            columns[name] = np.array(["" if value is None else str(value) for value in values])
    return columns
