"""``python -m fp4dit_ao.cli``, which ``torchrun -m fp4dit_ao.cli`` starts in every process."""

from fp4dit_ao.cli.app import main

main()
