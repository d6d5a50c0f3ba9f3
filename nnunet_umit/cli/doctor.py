"""``umit doctor``: explain what is installed and how to mend what is wrong, or check the images of a data set."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nnunet_umit.cli.checks import Check, State, check_folders, check_hook, check_names, check_versions, shim_line


def find_dataset(name: str) -> Path:
    """The raw data set folder for a path, a name (``Dataset004_Hippocampus``) or a number (``4``).

    Raises:
        FileNotFoundError: there is no such folder; the message lists what there is.
    """
    if Path(name).is_dir():
        return Path(name).resolve()
    raw = os.environ.get("nnUNet_raw")
    if not raw or not Path(raw).is_dir():
        raise FileNotFoundError(
            f"{name} is not a folder and nnUNet_raw is not set to one; give a path or export nnUNet_raw"
        )
    known = sorted(folder for folder in Path(raw).iterdir() if folder.is_dir() and folder.name.startswith("Dataset"))
    prefix = f"Dataset{int(name):03d}_" if name.isdigit() else None
    for folder in known:
        if folder.name == name or (prefix is not None and folder.name.startswith(prefix)):
            return folder
    raise FileNotFoundError(f"no data set {name} in {raw}; there is: {', '.join(f.name for f in known) or 'nothing'}")


def _report(console: Console, title: str, rows: list[Check]) -> bool:
    """Print rows as a table and the fixes below it, uncut, to be copied. Returns whether nothing is wrong."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(row.subject, f"[{row.state.value}]{row.state.name.lower()}[/]", escape(row.finding))
    console.print(table)
    for fix in dict.fromkeys(row.fix for row in rows if row.fix):
        subjects = ", ".join(row.subject for row in rows if row.fix == fix)
        console.print(f"{subjects}: [bold]{escape(fix)}[/]", soft_wrap=True)
    return all(row.state is not State.WRONG for row in rows)


def _check_dataset(console: Console, name: str) -> bool:
    from nnunet_umit.plans.integrity import check_dataset

    folder = find_dataset(name)
    problems = check_dataset(folder)
    for problem in problems:
        console.print(escape(str(problem)), style="red", soft_wrap=True)
    if problems and Path(os.environ.get("nnUNet_preprocessed", ""), folder.name, "dataset_fingerprint.json").is_file():
        advice = (
            "Plan and preprocess again with --clean when this is mended: the fingerprint was taken with these files"
        )
        console.print(advice, soft_wrap=True)
    verdict = f"{len(problems)} problem(s)" if problems else "[green]no problems[/]"
    console.print(f"{escape(str(folder))}: {verdict}", soft_wrap=True, highlight=False)
    return not problems


def doctor(
    dataset: Annotated[
        str | None,
        typer.Option("--dataset", "-d", help="Check the images of a raw data set instead: its number, name or folder."),
    ] = None,
) -> None:
    """Explain what is installed, what is missing and how to mend it.

    Ends with exit code 1 where something is wrong.
    """
    console = Console(highlight=False)
    if dataset is not None:
        try:
            fine = _check_dataset(console, dataset)
        except FileNotFoundError as error:
            console.print(f"[red]{escape(str(error))}[/]", soft_wrap=True)
            fine = False
        raise typer.Exit(0 if fine else 1)
    checks: list[tuple[str, Callable[[], list[Check]]]] = [
        ("Versions", check_versions),
        ("Registration", check_hook),
        ("Folders", check_folders),
        ("Names, as nnU-Net finds them", check_names),
    ]
    fine = all([_report(console, title, check()) for title, check in checks])  # a list: print all, whatever fails
    console.print("\nWithout the hook, training and prediction (not planning) also work after:")
    console.print(escape(shim_line()), soft_wrap=True)
    raise typer.Exit(0 if fine else 1)
