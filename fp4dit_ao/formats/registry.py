"""Number formats by name."""

from fp4dit_ao.formats.codebook import NF4, CodebookFormat
from fp4dit_ao.formats.codebook_groups import E1M2_GROUPS, E2M1_GROUPS, E3M0_GROUPS, NF4_GROUPS, CodebookSet
from fp4dit_ao.formats.float_format import FloatFormat, is_float_format_name
from fp4dit_ao.formats.number_format import NumberFormat
from fp4dit_ao.formats.twin_log import TWIN_LOGS

CODEBOOKS: dict[str, CodebookFormat] = {"nf4": NF4, **TWIN_LOGS}
"""Codebooks by name; :func:`register_codebook` adds one."""
CODEBOOK_SETS: dict[str, CodebookSet] = {
    codebooks.name: codebooks for codebooks in (NF4_GROUPS, E2M1_GROUPS, E3M0_GROUPS, E1M2_GROUPS)
}
"""Sets of codebooks by name, for weights with codebook groups; :func:`register_codebook_set` adds one."""
BUILT_IN = frozenset(CODEBOOKS) | frozenset(CODEBOOK_SETS)
"""Names of the codebooks and sets that come with the package; others travel in the record of a checkpoint."""


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
    taken = is_float_format_name(codebook.name) or codebook.name in CODEBOOK_SETS
    if taken or CODEBOOKS.get(codebook.name, codebook) != codebook:
        raise ValueError(f"codebook {codebook.name!r} has the name of another format; choose a name of its own")
    CODEBOOKS[codebook.name] = codebook
    return codebook


def codebook_set(name: str) -> CodebookSet:
    """The set of codebooks of that name.

    Raises:
        ValueError: there is none.
    """
    if not isinstance(name, str) or name not in CODEBOOK_SETS:
        raise ValueError(f"unknown codebook set {name!r}; choose one of {', '.join(CODEBOOK_SETS)}")
    return CODEBOOK_SETS[name]


def register_codebook_set(codebooks: CodebookSet) -> CodebookSet:
    """Makes ``codebooks`` known to configs and checkpoints; returns it.

    Raises:
        ValueError: its name is that of a format or of another set.
    """
    taken = is_float_format_name(codebooks.name) or codebooks.name in CODEBOOKS
    if taken or CODEBOOK_SETS.get(codebooks.name, codebooks) != codebooks:
        raise ValueError(f"codebook set {codebooks.name!r} has the name of another format; choose a name of its own")
    CODEBOOK_SETS[codebooks.name] = codebooks
    return codebooks
