"""Options of each command, one file each. A command imports what it runs when it is called, so that ``--help`` is quick."""
