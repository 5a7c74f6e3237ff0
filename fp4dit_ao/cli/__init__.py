"""The command ``fp4dit-ao``: one module a command, and :mod:`fp4dit_ao.cli.app`, which says how they are called."""
