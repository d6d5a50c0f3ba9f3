"""``umit run COMMAND ...``: a stock nnU-Net command with UMIT names registered by hand.

For installations that skip start-up files (``python -S``, ``pip install --target``, a security policy). The command
runs in this process; its worker processes import ``nnunet_umit.cli.app`` again and are registered by that.
"""

import difflib
import sys
from importlib.metadata import EntryPoint, entry_points
from typing import Annotated

import typer

from nnunet_umit.registration import register


def stock_commands() -> dict[str, EntryPoint]:
    """nnU-Net's console scripts by name, as its installation declares them."""
    scripts = entry_points(group="console_scripts")
    return {script.name: script for script in scripts if script.value.split(".")[0] == "nnunetv2"}


def run(
    command: Annotated[str, typer.Argument(help="A command of nnU-Net, such as nnUNetv2_train.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="Its arguments, unchanged.")] = None,
) -> None:
    """Run a stock nnU-Net command with UMIT names registered.

    Only needed where `umit doctor` says that the start-up hook is not active.
    """
    known = stock_commands()
    if command not in known:
        close = difflib.get_close_matches(command, known, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(sorted(known)) or 'none'}"
        typer.echo(f"nnU-Net has no command {command!r}; {hint}", err=True)
        raise typer.Exit(2)
    register()
    sys.argv = [command, *(arguments or [])]  # what the command parses, and what its workers inherit
    known[command].load()()
