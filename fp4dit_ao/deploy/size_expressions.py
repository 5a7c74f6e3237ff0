"""Relations between the sizes of a graph's inputs as text, such as ``(6*s1) // s0 == 6``, evaluated without
``eval``."""

import ast
import functools
import operator
import re
from collections.abc import Callable, Mapping

_OPERATORS: dict[type[ast.AST], Callable[..., int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.USub: operator.neg,
    ast.Eq: operator.eq,
}
_FUNCTIONS: dict[str, Callable[..., int]] = {"min": min, "max": max}
_WORD = re.compile(r"[A-Za-z_]\w*")


def evaluate(expression: str, sizes: Mapping[str, int]) -> int:
    """Value of ``expression``; a bool if it is an equality.

    Args:
        expression: whole numbers and names with ``+ - * // % == min max`` and brackets, in Python's syntax.
        sizes: values of the names.

    Raises:
        ValueError: the expression holds anything else, or a name without a value.
        ZeroDivisionError: the expression divides by zero.
    """
    try:
        return _value(_parsed(expression), sizes)
    except (SyntaxError, KeyError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(f"cannot evaluate {expression!r} of sizes {dict(sizes)}") from error


@functools.lru_cache(1024)
def _parsed(expression: str) -> ast.AST:
    return ast.parse(expression, mode="eval").body


def _value(node: ast.AST, sizes: Mapping[str, int]) -> int:
    match node:
        case ast.Constant(value=int(number)) if not isinstance(number, bool):
            return number
        case ast.Name(id=name):
            return sizes[name]
        case ast.UnaryOp(op=op, operand=x):
            return _OPERATORS[type(op)](_value(x, sizes))
        case ast.BinOp(left=left, op=op, right=right) | ast.Compare(left=left, ops=[op], comparators=[right]):
            return _OPERATORS[type(op)](_value(left, sizes), _value(right, sizes))
        case ast.Call(func=ast.Name(id=name), args=[*items], keywords=[]):
            return _FUNCTIONS[name](*(_value(item, sizes) for item in items))
    raise KeyError(type(node).__name__)


def readable(expression: str) -> bool:
    """Whether :func:`evaluate` understands ``expression``, which may hold any names."""
    try:
        evaluate(expression, dict.fromkeys(names(expression), 1))
    except ZeroDivisionError:
        return True
    except ValueError:
        return False
    return True


def names(expression: str) -> list[str]:
    """Names in ``expression``, each once, in order."""
    return [name for name in dict.fromkeys(_WORD.findall(expression)) if name not in _FUNCTIONS]


def rename(expression: str, new: Mapping[str, str]) -> str:
    """Replaces names in ``expression`` by those in ``new``."""
    return _WORD.sub(lambda found: new.get(found[0], found[0]), expression)
