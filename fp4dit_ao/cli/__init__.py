"""The command ``fp4dit-ao``: :mod:`fp4dit_ao.cli.commands` defines each command's options, and a module here runs it."""
