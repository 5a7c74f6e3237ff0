"""The command ``fp4dit-ao``: one module per command; :mod:`fp4dit_ao.cli.app` defines their options."""
