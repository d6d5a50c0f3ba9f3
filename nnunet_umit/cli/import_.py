"""``umit import``: a folder of images becomes an nnU-Net dataset for pre-training without labels."""

import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from nnunet_umit.cli.checks import set_line

if TYPE_CHECKING:
    from nnunet_umit.importing.run import Outcome, Request

LISTED = 20  # quarantine lines on the screen; the file has them all
_AIR = -800.0  # HU; the usual image of a CT goes below
_STOPPED = 130  # exit code of a process that Ctrl-C ended


def import_(
    folder: Annotated[Path, typer.Argument(help="Folder with images, in any sub-folders.", show_default=False)],
    dataset: Annotated[int, typer.Option("--dataset", "-d", help="Number of the new dataset, e.g. 901.")],
    name: Annotated[str, typer.Option("--name", "-n", help="Its name: letters, digits, _ and -.")] = "Unlabelled",
    raw: Annotated[
        Path | None, typer.Option(help="Where to write it; nnUNet_raw by default.", show_default=False)
    ] = None,
    modality: Annotated[
        str, typer.Option(help="Channel name of grey images. Say CT for CT: nnU-Net normalises that differently.")
    ] = "MRI",
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs",
            "-j",
            min=0,
            help="Processes, each with one image in memory; default: one a core, at most 8. 0: none, for debugging.",
            show_default=False,
        ),
    ] = None,
    max_voxels: Annotated[
        int | None,
        typer.Option(min=1, help="Refuse larger images by their header; default 536870912.", show_default=False),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            help="Leave out files and folders of this name or relative path, e.g. '*_seg.nii.gz'; repeatable."
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier import of this name.")] = False,
) -> None:
    """Turn a folder of images into an nnU-Net dataset for pre-training without labels.

    NIfTI, MHA, NRRD, PNG and TIFF are referenced where they are, DICOM series are converted. Every file is checked to
    its last byte; what is broken, repeated or of another kind goes to quarantine.csv with reason and fix, and never
    stops the rest. A body mask stands in as label, so that every stock command works. An interrupted import goes on
    when the same command is given again.

    Exit codes: 0 all imported, 1 some in quarantine, 2 nothing usable or a request that cannot be carried out.
    """
    # Lazily, as everywhere in this file: `umit import --help` needs none of the libraries below these modules.
    from nnunet_umit.importing.dataset import RequestError
    from nnunet_umit.importing.verdict import OutputError
    from nnunet_umit.importing.workers import WorkersError

    console = Console(highlight=False)
    try:
        request = _request(folder, dataset, name, raw, modality, jobs, max_voxels, exclude, overwrite)
        outcome = _run(console, request)
    except (RequestError, OutputError, WorkersError) as error:
        console.print(f"[bold red]umit import:[/bold red] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt as error:
        console.print("Stopped; no dataset was written. The same command goes on from here.", soft_wrap=True)
        raise typer.Exit(_STOPPED) from error
    report(console, request, outcome)
    raise typer.Exit(outcome.exit_code)


def _request(
    folder: Path,
    dataset: int,
    name: str,
    raw: Path | None,
    modality: str,
    jobs: int | None,
    max_voxels: int | None,
    exclude: list[str] | None,
    overwrite: bool,
) -> "Request":
    from nnunet_umit.importing.dataset import RequestError, folder_name
    from nnunet_umit.importing.run import MAX_VOXELS, Request

    place = str(raw) if raw is not None else os.environ.get("nnUNet_raw")
    if not place:
        raise RequestError("nnUNet_raw is not set; export it, or say --raw FOLDER")
    return Request(
        folder=folder,
        raw=Path(place),
        name=folder_name(dataset, name),
        modality=modality,
        jobs=min(_cores(), 8) if jobs is None else jobs,
        max_voxels=MAX_VOXELS if max_voxels is None else max_voxels,
        exclude=tuple(exclude or ()),
        overwrite=overwrite,
    )


def _run(console: Console, request: "Request") -> "Outcome":
    from nnunet_umit.importing.run import import_folder

    if not console.is_terminal:
        return import_folder(request, lambda done, total: None)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("looking for images", total=None)
        return import_folder(
            request, lambda done, total: bar.update(task, description="checking", completed=done, total=total)
        )


def report(console: Console, request: "Request", outcome: "Outcome") -> None:
    """Print what arrived, what did not and why, and the next commands."""
    from nnunet_umit.importing.dataset import count

    table = Table(title=request.name, title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    cases = outcome.cases
    if cases:
        table.add_row("imported", str(len(cases)), escape(_kind(outcome)), style="green")
        table.add_row("  shape (z, y, x)", "", _ranges([case.shape for case in cases]))
        table.add_row("  spacing, mm", "", _ranges([case.spacing for case in cases]))
        table.add_row("  voxels", f"{sum(case.voxels for case in cases):,}", "in all")
    for kind, number in count(outcome.rejections).items():
        example = next(entry for entry in outcome.rejections if entry.kind is kind)
        table.add_row(kind.value, str(number), escape(_shown(f"e.g. {Path(example.path).name}")), style="yellow")
    ignored = Counter(dict(outcome.ignored.most_common(5)))
    if ignored:
        text = ", ".join(f"{number} {what}" for what, number in ignored.items())
        table.add_row("ignored, no images", str(sum(outcome.ignored.values())), escape(_shown(text)), style="dim")
    console.print(table)
    for entry in outcome.rejections[:LISTED]:
        console.print(escape(_shown(f"{entry.path}: {entry.reason}. {entry.fix}.")), style="yellow", soft_wrap=True)
    if len(outcome.rejections) > LISTED:
        console.print(f"... and {len(outcome.rejections) - LISTED} more in the quarantine list")
    if outcome.resumed:
        console.print(f"{outcome.resumed} verdicts were taken over from an interrupted import")
    console.print(f"[bold]{len(cases)} imported, {len(outcome.rejections)} quarantined[/]")
    console.print(f"quarantine list: {escape(str(outcome.quarantine))}", soft_wrap=True)
    if cases:
        _next(console, request, outcome)
    else:
        console.print(f"[bold red]Nothing usable in {escape(str(request.folder))}; no dataset was written.[/]")


def _next(console: Console, request: "Request", outcome: "Outcome") -> None:
    lows = sorted(case.low for case in outcome.cases)
    if request.modality.casefold() != "ct" and lows[len(lows) // 2] < _AIR:
        console.print(
            f"Half of the images go down to {lows[len(lows) // 2]:g} or lower, as CT does: if it is CT, import again "
            "with --modality CT --overwrite, because nnU-Net normalises CT differently",
            style="yellow",
            soft_wrap=True,
        )
    number = int(request.name[7:10])
    configuration = "2d" if outcome.cases[0].dimension == 2 else "3d_fullres"
    preprocessed = os.environ.get("nnUNet_preprocessed")
    stale = preprocessed is not None and Path(preprocessed, request.name).exists()
    console.print("Next:")
    if os.environ.get("nnUNet_raw") != str(request.raw):
        console.print(f"  {escape(set_line('nnUNet_raw', str(request.raw.resolve())))}", soft_wrap=True)
    console.print(f"  nnUNetv2_plan_and_preprocess -d {number} -pl UMITPlanner{' --clean' if stale else ''}")
    console.print(f"  nnUNetv2_train {number} {configuration} all -tr UMITPretrainTrainer -p UMITPlans")


def _kind(outcome: "Outcome") -> str:
    case = outcome.cases[0]
    colours = "" if case.channels == 1 else f", {case.channels} channels"
    return f"{case.dimension}D, read by {case.reader}{colours}"


def _ranges(values: "list[tuple[int, int, int]] | list[tuple[float, float, float]]") -> str:
    """Smallest and largest value along each axis."""
    axes = [sorted(value[axis] for value in values) for axis in range(3)]
    return " x ".join(f"{axis[0]:g}" if axis[0] == axis[-1] else f"{axis[0]:g}-{axis[-1]:g}" for axis in axes)


def _shown(text: str) -> str:
    """Text that any terminal accepts, whatever bytes a file name is made of."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _cores() -> int:
    """Cores this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
