"""What the commands of ``fp4dit-ao`` do; :mod:`fp4dit_ao.cli` says how they are called."""
