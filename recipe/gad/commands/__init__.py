"""The subcommands of ``gad``: arguments and help texts; the work is done by the modules they name."""
