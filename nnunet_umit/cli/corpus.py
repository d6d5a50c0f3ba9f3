"""``umit corpus``: several datasets become one pre-training dataset, without copying an image."""

import json
import math
import os
import re
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

SOURCE_PLANS = "UMITCorpusPlans"  # written where a dataset has no 3d_native of ours yet; never touches other plans
NATIVE = "3d_native"
PLANNED_SIZES = ("XS", "S", "B", "L")


def corpus(
    datasets: Annotated[list[str], typer.Option("-d", "--dataset", help="Number or name; give it several times.")],
    number: Annotated[int, typer.Option("--id", min=1, max=999, help="Number of the new dataset.")],
    name: Annotated[str, typer.Option(help="Name of the new dataset.")] = "Corpus",
    weight: Annotated[
        list[str] | None,
        typer.Option(help="DATASET=FACTOR: draw it more or less often. All begin with the square root of their cases."),
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="XS, S, B or L, as the network it is to be fine-tuned into; else by the images.")
    ] = None,
    gpu_memory_target: Annotated[float, typer.Option(help="GB that a training step may take.")] = 8.0,
    processes: Annotated[int, typer.Option("-np", min=1, help="Processes for preprocessing.")] = 2,
) -> None:
    """Make one pre-training dataset of several, labelled or not, of any modality, spacing and dimension.

    Datasets that were not preprocessed for 3d_native are, with nnU-Net's own command. Every channel becomes an image
    of its own (colour stays whole). Then: nnUNetv2_train NUMBER 3d_native all -tr UMITPretrainTrainer -p UMITPlans
    """
    console = Console()
    try:
        build(datasets, number, name, weight or [], gpu_memory_target, processes, console, size)
    except (ValueError, RuntimeError, OSError) as error:
        console.print(f"[red]umit corpus:[/red] {escape(str(error))}", highlight=False)
        raise typer.Exit(2) from error


def build(
    datasets: list[str],
    number: int,
    name: str,
    weights: list[str],
    memory_target: float,
    processes: int,
    console: Console,
    size: str | None = None,
) -> Path:
    """Preprocess what is missing, index all cases, plan, write; returns the dataset's preprocessed folder.

    Raises:
        ValueError: an unknown dataset, weight or size, a number that is taken, or datasets without images.
        StockCommandError: preprocessing failed.
    """
    from nnunetv2.paths import nnUNet_preprocessed
    from nnunetv2.utilities.dataset_name_id_conversion import find_candidate_datasets

    from nnunet_umit.plans.corpus import COLOUR, FILE, Corpus, Source, is_colour
    from nnunet_umit.trainers.requirements import require_folders

    require_folders()
    if size not in (None, *PLANNED_SIZES):
        raise ValueError(f"--size {size} must be one of {', '.join(PLANNED_SIZES)}")
    preprocessed = Path(str(nnUNet_preprocessed))
    raw = Path(os.environ.get("nnUNet_raw") or preprocessed / "no raw data")  # preprocessed ones are enough
    names = [dataset_name(each) for each in datasets]
    twice = [each for each in dict.fromkeys(names) if names.count(each) > 1]
    if twice:
        raise ValueError(f"--dataset names {', '.join(twice)} more than once; draw it more often with --weight")
    target = f"Dataset{number:03d}_{name}"
    taken = [str(each) for each in find_candidate_datasets(number) if str(each) != target]
    if taken or target in names:
        raise ValueError(f"dataset number {number} is taken by {', '.join(taken or [target])}; choose another --id")
    home = preprocessed / target / f"UMITPlans_{NATIVE}"
    if (raw / target).is_dir() or ((preprocessed / target / "dataset.json").is_file() and not (home / FILE).is_file()):
        raise ValueError(f"{target} is a dataset already, and no corpus; choose another --id")
    factors = parse_weights(weights, names)
    folders = [native_folder(each, raw, preprocessed, processes, console) for each in names]
    described = [json.loads((preprocessed / each / "dataset.json").read_text(encoding="utf-8")) for each in names]
    sources = []
    for each, folder, dataset_json in zip(names, folders, described, strict=True):
        cases = len(list(folder.glob("*.pkl")))
        licence = str(dataset_json.get("licence", dataset_json.get("license", "unknown")))
        schemes = normalisation(preprocessed, each, folder)
        weight = factors[each] * cases**0.5
        sources.append(Source(each, os.path.relpath(folder, home), weight, schemes, licence))
    made = Corpus(COLOUR if any(map(is_colour, described)) else 1, sources, root=home)
    for index, (folder, dataset_json) in enumerate(zip(folders, described, strict=True)):
        add_cases(made, index, folder, is_colour(dataset_json))
    home.mkdir(parents=True, exist_ok=True)
    made.write(home)  # first: it tells this folder from another dataset's
    choice = write_plans(made, preprocessed / target, target, memory_target, size)
    show(made, target, console)
    planner = "UMITPlanner" + choice.size.removeprefix("XS")
    for line in (
        choice.why,
        f"Next: nnUNetv2_train {number} {NATIVE} all -tr UMITPretrainTrainer -p UMITPlans",
        f"It fine-tunes networks of its size: plan those datasets with -pl {planner}"
        + ("" if choice.size != "XS" else ", and see that it says XS"),
    ):
        console.print(line, highlight=False)
    return preprocessed / target


def dataset_name(text: str) -> str:
    """The dataset that ``-d`` means: ``"4"`` or ``"Dataset004_Hippocampus"``.

    A name is taken only if nnU-Net has that dataset: a folder under another name but the same number would make the
    number ambiguous for every command.

    Raises:
        ValueError: neither a number nor a name, or no such dataset.
        RuntimeError: nnU-Net knows no dataset, or several, of that number.
    """
    from nnunetv2.utilities.dataset_name_id_conversion import convert_id_to_dataset_name, find_candidate_datasets

    found = re.fullmatch(r"(\d+)|Dataset(\d{3})_.+", text)
    if found is None:
        raise ValueError(f"--dataset {text} is neither a number nor a name such as Dataset004_Hippocampus")
    if found[1]:
        return str(convert_id_to_dataset_name(int(found[1])))
    known = [str(each) for each in find_candidate_datasets(int(found[2]))]
    if text not in known:
        raise ValueError(
            f"--dataset {text}: nnU-Net's folders hold no such dataset"
            + (f", number {int(found[2])} is {', '.join(known)}" if known else "; convert it to nnUNet_raw first")
        )
    return text


def parse_weights(weights: list[str], names: list[str]) -> dict[str, float]:
    """``["4=0.5"]`` -> factor for every dataset, 1 where none is given."""
    factors = dict.fromkeys(names, 1.0)
    for text in weights:
        key, _, value = text.partition("=")
        found = [
            each for each in names if each == key or (key.isdigit() and each.startswith(f"Dataset{int(key):03d}_"))
        ]
        try:
            factor = float(value)
        except ValueError:
            factor = -1.0
        if not found or not 0 < factor < float("inf"):
            raise ValueError(f"--weight {text} must be DATASET=FACTOR with one of {', '.join(names)} and a factor > 0")
        factors[found[0]] = factor
    return factors


def native_folder(dataset: str, raw: Path, preprocessed: Path, processes: int, console: Console) -> Path:
    """The folder of the dataset's complete ``3d_native`` cases, preprocessed first where there is none."""
    changed = raw_has_changed(raw / dataset, preprocessed / dataset)
    for plans in () if changed else (SOURCE_PLANS, "UMITPlans"):  # ours first: made when the raw data had changed
        folder = preprocessed / dataset / f"{plans}_{NATIVE}"
        if complete(preprocessed / dataset, folder, raw / dataset):
            return folder
    from nnunet_umit.cli.stock import StockRunner

    runner = StockRunner(console, preprocessed / dataset / "umit_corpus_logs", 1)
    runner.run(
        f"{dataset}: plan and preprocess",
        "nnUNetv2_plan_and_preprocess",
        *("-d", str(int(dataset[7:10])), "-pl", "UMITPlanner", "-overwrite_plans_name", SOURCE_PLANS, "-c", NATIVE),
        *("-np", str(processes), "-npfp", str(processes)),
        *(["--clean"] if changed else []),  # the fingerprint too
        environment=dict(os.environ),
    )
    folder = preprocessed / dataset / f"{SOURCE_PLANS}_{NATIVE}"
    if not complete(preprocessed / dataset, folder, raw / dataset):
        raise RuntimeError(f"{folder} does not hold all cases after preprocessing; see umit_corpus_logs beside it")
    return folder


def complete(dataset: Path, folder: Path, raw: Path) -> bool:
    """Whether the training cases of a preprocessed dataset, and no others where they are known, are in a folder, and
    were made with its present fingerprint: planning with ``--clean`` takes another one of images that have changed."""
    from nnunet_umit.plans.integrity import training_cases

    file = dataset / "dataset.json"
    if not file.is_file() or not folder.is_dir():
        return False
    content = json.loads(file.read_text(encoding="utf-8"))
    images = {each.stem for each in folder.glob("*.b2nd") if not each.stem.endswith("_seg")}
    done = images & {each.stem for each in folder.glob("*.pkl")}
    if (raw / "imagesTr").is_dir() or "dataset" in content:
        oldest = min((each.stat().st_mtime for each in folder.glob("*.pkl")), default=0.0)
        fingerprint = dataset / "dataset_fingerprint.json"
        current = not raw.is_dir() or not fingerprint.is_file() or fingerprint.stat().st_mtime <= oldest
        return current and done == set(content.get("dataset") or training_cases(raw, content))
    return len(done) >= int(content["numTraining"]) > 0


def raw_has_changed(raw: Path, preprocessed: Path) -> bool:
    """Whether a raw dataset has other cases, channels or labels than when it was planned (imported again, say)."""
    files = (folder / "dataset.json" for folder in (raw, preprocessed))
    known = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]
    same = ("channel_names", "labels", "numTraining", "file_ending", "overwrite_image_reader_writer", "dataset")
    return len(known) == 2 and any(known[0].get(key) != known[1].get(key) for key in same)


def normalisation(preprocessed: Path, dataset: str, folder: Path) -> list[str]:
    """Normalisation schemes of the plans that a folder was preprocessed with."""
    plans = folder.name.removesuffix(f"_{NATIVE}")
    content = json.loads((preprocessed / dataset / f"{plans}.json").read_text(encoding="utf-8"))
    schemes: list[str] = content["configurations"][NATIVE]["normalization_schemes"]
    return schemes


def add_cases(made: Any, index: int, folder: Path, colour: bool) -> None:
    """Add the images of a preprocessed folder; only one voxel of each is read."""
    from nnunet_umit.architectures.native import SPACING_CHANNELS
    from nnunet_umit.trainers.unlabelled import UnlabelledBlosc2

    for file in sorted(folder.glob("*.pkl")):
        data = UnlabelledBlosc2.open_image(str(folder), file.stem)
        spacing = [float(data[channel, 0, 0, 0]) for channel in range(-SPACING_CHANNELS, 0)]
        made.add(index, file.stem, data.shape[0] - SPACING_CHANNELS, colour, spacing, data.shape[1:])


def write_plans(made: Any, folder: Path, dataset: str, memory_target: float, size: str | None) -> Any:
    """Plans, dataset.json and fingerprint, which nnU-Net reads besides the images; returns the choice of a size."""
    from nnunet_umit.plans.configuration import plan_configuration
    from nnunet_umit.plans.layout import Task
    from nnunet_umit.plans.memory import GB
    from nnunet_umit.plans.native import THICKEN, native_configuration, representative
    from nnunet_umit.plans.orientation import Orientation
    from nnunet_umit.plans.sizing import SizeChoice

    extent = representative(made.spacing, made.shape)
    task = Task(
        spacing=extent.spacing,
        median_shape=extent.shape,
        dataset_voxels=float(sum(math.prod(shape) for shape in made.shape)),
        input_channels=made.channels,
        num_classes=2,
        target_bytes=memory_target * GB,
    )
    choice = task.choose_size() if size is None else SizeChoice(size, f"{size} because --size says so.")
    configuration = plan_configuration(
        task,
        choice,
        Orientation((0, 1, 2)),
        data_identifier=f"UMITPlans_{NATIVE}",
        normalisation=["ZScoreNormalization"] * made.channels,
        use_mask=[False] * made.channels,
        thicken=THICKEN,
    )
    spacings, shapes = (np.asarray(column, dtype=float) for column in (made.spacing, made.shape))
    plans = {
        "dataset_name": dataset,
        "plans_name": "UMITPlans",
        "original_median_spacing_after_transp": np.median(spacings, 0).tolist(),
        "original_median_shape_after_transp": np.median(shapes, 0).round().astype(int).tolist(),
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],  # the cases of the sources are turned already
        "transpose_backward": [0, 1, 2],
        "configurations": {NATIVE: native_configuration(configuration, extent)},
        "experiment_planner_used": "umit corpus",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {},
    }
    description = {
        "channel_names": {str(channel): f"image{channel}" for channel in range(made.channels)},
        "labels": {"background": 0, "none": 1},
        "numTraining": len(made.case),
        "file_ending": ".b2nd",
        "licence": "; ".join(f"{source.name}: {source.licence}" for source in made.sources),
    }
    fingerprint = {"corpus": [source.name for source in made.sources]}
    for name, content in (("UMITPlans", plans), ("dataset", description), ("dataset_fingerprint", fingerprint)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
    return choice


def show(made: Any, dataset: str, console: Console) -> None:
    """The datasets of a corpus as a table."""
    table = Table(
        title=f"{dataset}: {len(made.case)} images, {made.channels} channel{'s' if made.channels > 1 else ''}"
    )
    for column in ("dataset", "cases", "images", "spacing (mm)", "drawn"):
        table.add_column(column, overflow="fold")
    for row in made.table():
        table.add_row(*row)
    console.print(table)
