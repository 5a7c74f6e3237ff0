"""A griffe extension: Sphinx's roles and double colons in docstrings become Markdown, as mkdocstrings shows it."""

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:func|class|meth|data|attr|mod|exc|obj):`(~?)([^`<]+)`")


class DocstringRoles(griffe.Extension):
    """Rewrites docstrings when they are loaded."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(text: str) -> str:
    """``:func:`~a.b``` as a name in code, whole or its last part; ``::`` before an indented block as one colon."""
    text = _ROLE.sub(lambda match: f"`{match[2].split('.')[-1] if match[1] else match[2]}`", text)
    return re.sub(r"::$", ":", text, flags=re.MULTILINE)
