"""Types of what torch hands to tensor subclasses and modes: an operator, and arguments of the types that its schema has."""

from collections.abc import Callable
from typing import Any

Operator = Callable[..., Any]
"""An aten operator, or a function of torch."""
Arguments = tuple[Any, ...]
"""Its positional arguments."""
Keywords = dict[str, Any]
"""Its keyword arguments."""
