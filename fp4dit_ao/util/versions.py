"""Versions of this package, also where it runs from a plain tree, and of those that it uses."""

from importlib import metadata

from fp4dit_ao import __version__


def version_of(package: str) -> str:
    """The version of an installed package, by its name on PyPI; this package's own one needs no installation.

    Raises:
        PackageNotFoundError: it is not installed.
    """
    return __version__ if package == "fp4dit-ao" else metadata.version(package)
