"""The ``umit`` command: a table of sub-commands, each imported only when it is run.

``umit --help`` therefore needs neither torch nor nnU-Net, and a broken installation can still be asked what is wrong.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Annotated

import typer

from nnunet_umit import __version__
from nnunet_umit.registration import register

# Importing this module is part of running `umit`, and worker processes started by "spawn" import it again before they
# do anything else: that is what makes `umit run` right in nnU-Net's workers where there is no start-up hook.
register()

app = typer.Typer(
    name="umit",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Companion of nnU-Net's own commands: what is installed, a demo, and a runner for odd installations.",
)

# name -> (module, with a function of the module's own name, and sentence in `umit --help`)
SUBCOMMANDS = {
    "doctor": ("nnunet_umit.cli.doctor", "Explain what is installed, what is missing and how to mend it."),
    "corpus": ("nnunet_umit.cli.corpus", "Make one pre-training dataset of several, without copying an image."),
    "demo": ("nnunet_umit.cli.demo", "Plan, pre-train, fine-tune and predict on a small real data set."),
    "import": ("nnunet_umit.cli.import_", "Turn a folder of images into a dataset for pre-training without labels."),
    "train": ("nnunet_umit.cli.train", "nnUNetv2_train as one of torchrun's processes, on one or several machines."),
    "run": ("nnunet_umit.cli.run", "Run a stock nnU-Net command where the start-up hook is not available."),
}


def _delegate(name: str, module: str) -> Callable[[typer.Context], None]:
    """A command that knows only where the real one lives, and hands all its arguments on, ``--help`` included."""

    def command(context: typer.Context) -> None:
        real = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        # Options end at the first argument: `umit run nnUNetv2_train --help` asks nnUNetv2_train. All that `umit train`
        # does not know, before it or behind it, is nnUNetv2_train's.
        settings = {"allow_interspersed_args": False, "ignore_unknown_options": name == "train"}
        real.command(context_settings=settings if name in ("run", "train") else None)(
            getattr(import_module(module), module.rpartition(".")[2])
        )
        real(context.args, prog_name=f"umit {name}")

    return command


for _name, (_module, _summary) in SUBCOMMANDS.items():
    app.command(
        _name,
        help=_summary,
        add_help_option=False,
        context_settings={
            "allow_extra_args": True,
            "ignore_unknown_options": True,
            "allow_interspersed_args": False,
        },
    )(_delegate(_name, _module))


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"nnunet-umit {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options that stand before a sub-command."""


def main() -> None:
    """Entry point of the ``umit`` console script."""
    app(prog_name="umit")


if __name__ == "__main__":
    main()
