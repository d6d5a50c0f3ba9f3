"""The ``umit`` command, one file a sub-command."""
