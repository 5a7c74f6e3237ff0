"""Number formats by name."""

from fp4dit_ao.formats.codebook import NF4, CodebookFormat
from fp4dit_ao.formats.float_format import FloatFormat, is_float_format_name
from fp4dit_ao.formats.number_format import NumberFormat

CODEBOOKS: dict[str, CodebookFormat] = {"nf4": NF4}
"""Codebooks by name; :func:`register_codebook` adds one."""
BUILT_IN = frozenset(CODEBOOKS)
"""Names of the codebooks that come with the package; others travel in the record of a checkpoint."""


def parse(name: str) -> NumberFormat:
    """Format of a name: one that :meth:`FloatFormat.parse` reads, or one of :data:`CODEBOOKS`.

    Raises:
        ValueError: there is no such format.
    """
    if isinstance(name, str) and name in CODEBOOKS:
        return CODEBOOKS[name]
    try:
        return FloatFormat.parse(name)
    except ValueError as error:
        if is_float_format_name(name):
            raise
        raise ValueError(f"{error}, or a codebook's name: {', '.join(CODEBOOKS)}") from None


def register_codebook(codebook: CodebookFormat) -> CodebookFormat:
    """Registers ``codebook``, so that :func:`parse`, configs, operators and checkpoints take its name; returns it.

    Raises:
        ValueError: another format has its name.
    """
    if is_float_format_name(codebook.name) or CODEBOOKS.get(codebook.name, codebook) != codebook:
        raise ValueError(f"codebook {codebook.name!r} has the name of another format; choose a name of its own")
    CODEBOOKS[codebook.name] = codebook
    return codebook
