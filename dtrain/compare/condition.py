"""`fail_if`: a condition on a comparison's figures, such as `ddp.tokens_per_second < 0.9 *
baseline`.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable

from dtrain.compare.results import FIGURES, Results

OPERATORS: dict[type, Callable] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip
EXAMPLE = 'such as "ddp.tokens_per_second < 0.9 * baseline"'


class Condition:
    """Comparisons of figures, joined by `and` and `or`.

    A figure is `strategy.figure`, with quotes around what is no plain name: `'pipeline
    schedule=zbv'.wire_bytes`. `baseline` is the same figure of the baseline; with two results, of
    the same strategy in the first one.

    Raises:
        ValueError: anything else.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        try:
            self._tree = ast.parse(text.strip(), mode="eval").body
        except SyntaxError:
            raise ValueError(f"fail_if={text!r} is no condition, {EXAMPLE}") from None
        self._check(self._tree)

    def holds(self, results: Results, earlier: Results | None = None) -> bool:
        """
        Raises:
            ValueError: a strategy that is not there or has no such figure.
        """
        return self._truth(self._tree, results, earlier)

    @property
    def strategies(self) -> list[str]:
        """Labels that it names."""
        return [label for label, _ in _figures(self._tree)]

    def _check(self, node: ast.AST) -> None:
        if isinstance(node, ast.BoolOp):
            for value in node.values:
                self._check(value)
            return
        if not isinstance(node, ast.Compare) or any(
            type(each) not in OPERATORS for each in node.ops
        ):
            raise ValueError(
                f"fail_if={self.text!r} must compare figures by <, <=, > or >=, {EXAMPLE}"
            )
        for side in (node.left, *node.comparators):
            self._check_term(side)
        figures = _figures(node)
        if not figures:
            raise ValueError(f"fail_if={self.text!r} names no strategy's figure, {EXAMPLE}")
        if (
            any(isinstance(each, ast.Name) and each.id == "baseline" for each in ast.walk(node))
            and len(figures) > 1
        ):
            raise ValueError(
                f"fail_if={self.text!r}: baseline may be any of "
                f"{', '.join(sorted(f for _, f in figures))}"
            )

    def _check_term(self, node: ast.AST) -> None:
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            self._check_term(node.left)
            self._check_term(node.right)
        elif isinstance(node, ast.Attribute) and (named := _figure(node)):
            if named[1] not in FIGURES:
                raise ValueError(
                    f"fail_if={self.text!r}: {named[1]} is none of the figures {', '.join(FIGURES)}"
                )
        elif not (isinstance(node, ast.Constant) and isinstance(node.value, int | float)) and not (
            isinstance(node, ast.Name) and node.id == "baseline"
        ):
            raise ValueError(
                f"fail_if={self.text!r}: {ast.unparse(node)!r} is no number and no figure, "
                f"{EXAMPLE}"
            )

    def _truth(self, node: ast.AST, results: Results, earlier: Results | None) -> bool:
        if isinstance(node, ast.BoolOp):
            join = all if isinstance(node.op, ast.And) else any
            return join(self._truth(value, results, earlier) for value in node.values)
        assert isinstance(node, ast.Compare)
        strategy, figure = _figures(node)[0]

        def value(term: ast.AST) -> float:
            if isinstance(term, ast.BinOp):
                return float(OPERATORS[type(term.op)](value(term.left), value(term.right)))
            if isinstance(term, ast.Constant):
                return float(term.value)  # type: ignore[arg-type]
            label, name = _figure(term) or ("", figure)
            before = earlier.row(strategy) if earlier and not label else None
            row = results.row(label) if label else before or results.row(results.baseline)
            if (found := getattr(row, name)) is None:
                raise ValueError(f"fail_if: {row.strategy!r} has no {name}")
            return float(found)

        try:
            sides = [value(side) for side in (node.left, *node.comparators)]
        except ZeroDivisionError:
            raise ValueError(f"fail_if={self.text!r} divides by zero") from None
        return all(
            OPERATORS[type(op)](a, b) for op, a, b in zip(node.ops, sides, sides[1:], strict=False)
        )


def _figures(node: ast.AST) -> list[tuple[str, str]]:
    return list(dict.fromkeys(found for each in ast.walk(node) if (found := _figure(each))))


def _figure(node: ast.AST) -> tuple[str, str] | None:
    """(strategy, figure) of `strategy.figure` or `'strategy'.figure`."""
    if isinstance(node, ast.Attribute):
        if isinstance(node.value, ast.Name):
            return node.value.id, node.attr
        if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            return node.value.value, node.attr
    return None
