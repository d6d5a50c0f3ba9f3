"""Several datasets as one: every channel an image, weights obeyed, nothing copied, and a training that names them."""

import io
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_training as tiny
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from rich.console import Console
from tiny_training import curves, equal, folder_of, log_of, weights

from nnunet_umit.cli.corpus import build, complete, parse_weights, raw_has_changed
from nnunet_umit.cli.stock import StockRunner
from nnunet_umit.plans.corpus import FILE, Corpus, Source, is_colour
from nnunet_umit.trainers.corpus import CorpusDataset, corpus_table
from nnunet_umit.trainers.finetune import UMITTrainer
from nnunet_umit.trainers.pretrain import UMITPretrainTrainer

pytestmark = pytest.mark.usefixtures("one_thread")

FIRST, SECOND, COLOUR = "Dataset911_Thin", "Dataset912_Thick", "Dataset913_Colour"
SOURCES = {
    FIRST: {"spacings": ((1.0, 1.0, 1.0),), "cases": 4, "channels": 1},
    SECOND: {"spacings": ((4.0, 1.0, 1.0), (5.0, 0.8, 0.8)), "cases": 2, "channels": 2},
    COLOUR: {"spacings": ((999.0, 1.0, 1.0),), "cases": 3, "channels": 3},
}


@pytest.fixture
def make(nnunet_env: Any) -> Callable[..., Path]:
    """Preprocess some of ``SOURCES`` and build a corpus of them; returns its preprocessed folder."""

    def make(*names: str, weight: list[str] | None = None) -> Path:
        for name in names:
            options = SOURCES[name]
            plans = tiny.make_plans(native=True, dataset=name, channels=options["channels"])
            tiny.write_preprocessed(
                nnunet_env.preprocessed, plans, cases=options["cases"], spacings=options["spacings"], seed=len(name)
            )
            file = nnunet_env.preprocessed / name / "dataset.json"
            description = json.loads(file.read_text())
            if name == COLOUR:
                description["channel_names"] = {"0": "R", "1": "G", "2": "B"}
            file.write_text(json.dumps(description))
        return build(list(names), 900, "Corpus", weight or [], 8.0, 1, Console(quiet=True))

    return make


def shrink(corpus: Path) -> dict[str, Any]:
    """A network and a schedule for tests, in the plans of a corpus."""
    file = corpus / "UMITPlans.json"
    plans = json.loads(file.read_text())
    configuration = plans["configurations"]["3d_native"]
    configuration["patch_size"] = [16, 16, 16]
    tiny_plan = tiny.make_plans(native=True)["configurations"]["3d_native"]
    configuration["architecture"]["arch_kwargs"] |= {
        name: tiny_plan["architecture"]["arch_kwargs"][name]
        for name in ("embed_dim", "depth", "num_heads", "stem_channels", "decoder_channels", "token_size", "strides")
    }
    configuration["umit"]["pretrain"] |= {**tiny_plan["umit"]["pretrain"], "iterations_per_epoch": 12}
    file.write_text(json.dumps(plans))
    return plans


def test_every_channel_is_an_image_and_colour_stays_whole(make: Callable[..., Path]) -> None:
    corpus = Corpus.read(make(FIRST, SECOND, COLOUR) / "UMITPlans_3d_native")
    assert corpus is not None and corpus.channels == 3
    names = corpus.identifiers()
    assert len(names) == len(set(names)) == 4 + 2 * 2 + 3
    assert [name for name in names if "case_000" in name] == [
        f"{FIRST}/case_000", f"{SECOND}/case_000#0", f"{SECOND}/case_000#1", f"{COLOUR}/case_000",
    ]  # fmt: skip
    shares = np.array(corpus.weights()) / sum(corpus.weights())
    of = {name: sum(s for s, n in zip(shares, names, strict=True) if n.startswith(name)) for name in SOURCES}
    roots = {name: options["cases"] ** 0.5 for name, options in SOURCES.items()}
    assert of == pytest.approx({name: root / sum(roots.values()) for name, root in roots.items()})
    assert shares[names.index(f"{SECOND}/case_000#0")] == pytest.approx(of[SECOND] / 4)
    table = corpus_table(corpus)
    assert table.spacings[names.index(f"{SECOND}/case_001#1")].tolist() == pytest.approx([5.0, 0.8, 0.8])
    assert table.groups[0] == FIRST
    assert corpus.table()[1][:4] == (SECOND, "2", "4", "4-5 x 0.8-1 x 0.8-1")


def test_images_are_read_from_where_they_are(make: Callable[..., Path], nnunet_env: Any) -> None:
    folder = make(FIRST, SECOND, COLOUR) / "UMITPlans_3d_native"
    assert [file.name for file in folder.iterdir()] == [FILE]
    dataset = pickle.loads(pickle.dumps(CorpusDataset(str(folder))))  # as a spawned worker gets it

    def stored(name: str) -> np.ndarray:
        return nnUNetDatasetBlosc2(str(nnunet_env.preprocessed / name / "UMITPlans_3d_native")).load_case("case_001")[0]

    image, label, _, properties = dataset.load_case(f"{SECOND}/case_001#1")
    assert image.shape[0] == 6 and not label.any() and properties == {"class_locations": None}
    part = (slice(1, 3), slice(2, 9), slice(0, 5))
    whole = stored(SECOND)[:]
    for channel in range(3):  # grey images fill the three channels of a corpus with colour
        assert np.array_equal(image[(slice(0, 6), *part)][channel], whole[(1, *part)])
    assert np.array_equal(image[-3:, 0, 0, 0], whole[-3:, 0, 0, 0])
    colour = dataset.load_case(f"{COLOUR}/case_001")[0]
    assert np.array_equal(colour[:, :, :, :], stored(COLOUR)[:])


def test_a_corpus_without_colour_has_one_channel(make: Callable[..., Path]) -> None:
    folder = make(FIRST, SECOND)
    corpus = Corpus.read(folder / "UMITPlans_3d_native")
    assert corpus is not None and corpus.channels == 1
    assert len(json.loads((folder / "dataset.json").read_text())["channel_names"]) == 1
    plans = json.loads((folder / "UMITPlans.json").read_text())["configurations"]["3d_native"]
    assert plans["architecture"]["arch_kwargs"]["native"] is True and plans["umit"]["pretrain"]["thicken"] > 0


def test_pretraining_names_every_dataset_and_level(make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(FIRST, SECOND, COLOUR)
    plans = shrink(folder)
    plans["dataset_name"] = folder.name
    description = json.loads((folder / "dataset.json").read_text())
    trainer = tiny.make_trainer(UMITPretrainTrainer, plans, channel_names=description["channel_names"])
    trainer.run_training()
    trainer.perform_actual_validation()
    groups = trainer.history["group_losses"][-1]
    assert {name.split(",")[0] for name in groups} == set(SOURCES)
    assert any(name == f"{COLOUR}, 2D" for name in groups) and any(
        name.startswith(f"{SECOND}, level 2") for name in groups
    )
    assert f"masked loss, {SECOND}, level 2" in log_of(trainer)
    card = json.loads((folder_of(trainer) / "card.json").read_text())
    assert [source["name"] for source in card["corpus"]] == list(SOURCES)
    assert (folder_of(trainer) / "reconstructions.png").stat().st_size > 0

    single = tiny.make_plans(channels=2)
    tiny.write_preprocessed(folder.parent, single)
    finetuner = tiny.make_trainer(UMITTrainer, single)
    finetuner.initialize()
    report = finetuner.network.load_umit_pretrained(str(folder_of(trainer) / "checkpoint_final.pth"))
    assert report.fraction == 1.0 and "channels 3 -> 2" in str(report)
    again = tiny.make_trainer(UMITPretrainTrainer, plans, channel_names=description["channel_names"])
    monkeypatch.setattr(UMITPretrainTrainer, "draw", lambda self: None)
    again.run_training()
    assert curves(again) == curves(trainer) and equal(weights(again), weights(trainer))


def test_what_a_corpus_cannot_do_is_refused(make: Callable[..., Path]) -> None:
    folder = make(FIRST, SECOND)
    plans = shrink(folder)
    with pytest.raises(ValueError, match="train fold 'all'"):
        tiny.make_trainer(UMITPretrainTrainer, plans, fold=0)
    trainer = tiny.make_trainer(UMITTrainer, plans)
    with pytest.raises(NotImplementedError, match="can only be pre-trained on"):
        trainer.initialize()
    with pytest.raises(ValueError, match="number 911 is taken by Dataset911_Thin"):
        build([SECOND], 911, "Corpus", [], 8.0, 1, Console(quiet=True))
    with pytest.raises(ValueError, match="Dataset911_Thi: nnU-Net's folders hold no such dataset, number 911 is Datas"):
        build(["Dataset911_Thi"], 900, "Corpus", [], 8.0, 1, Console(quiet=True))
    assert not (folder.parent / "Dataset911_Thi").exists(), "number 911 would be two datasets then"
    with pytest.raises(ValueError, match="--dataset Thin is neither a number nor a name"):
        build(["Thin"], 900, "Corpus", [], 8.0, 1, Console(quiet=True))
    with pytest.raises(ValueError, match="--dataset names Dataset911_Thin more than once"):
        build(["911", FIRST], 900, "Corpus", [], 8.0, 1, Console(quiet=True))
    with pytest.raises(ValueError, match="Dataset911_Thin is a dataset already, and no corpus"):
        build([SECOND], 911, "Thin", [], 8.0, 1, Console(quiet=True))
    (folder / "UMITPlans_3d_native" / FILE).write_text("{")
    with pytest.raises(ValueError, match="is damaged .* `umit corpus`"):
        Corpus.read(folder / "UMITPlans_3d_native")
    assert Corpus.read(folder) is None


def test_a_dataset_that_was_imported_again_is_preprocessed_again(
    make: Callable[..., Path], nnunet_env: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(FIRST)
    planned = nnunet_env.preprocessed / FIRST
    description = json.loads((planned / "dataset.json").read_text())
    raw = nnunet_env.raw / FIRST
    raw.mkdir()
    typed: list[tuple[str, ...]] = []

    def run(self: Any, title: str, *words: str, **options: Any) -> None:
        typed.append(words)
        (planned / "dataset.json").write_text((raw / "dataset.json").read_text())
        (planned / "UMITPlans_3d_native").rename(planned / "UMITCorpusPlans_3d_native")
        (planned / "UMITPlans.json").rename(planned / "UMITCorpusPlans.json")

    monkeypatch.setattr(StockRunner, "run", run)
    cases = {f"case_{index:03d}": {"images": [], "label": ""} for index in range(description["numTraining"])}
    for content in (description, description | {"dataset": cases}):
        (raw / "dataset.json").write_text(json.dumps(content))
        build([FIRST], 900, "Corpus", [], 8.0, 1, Console(quiet=True))
    assert len(typed) == 1 and "--clean" in typed[0], "once, for the list of cases that is new"
    fewer = dict(list(cases.items())[1:])
    (raw / "dataset.json").write_text(json.dumps(description | {"dataset": fewer}))
    assert raw_has_changed(raw, planned)
    assert not complete(raw, planned / "UMITCorpusPlans_3d_native", raw), "a case that is not in the dataset any more"


def test_images_that_were_planned_anew_are_preprocessed_anew(make: Callable[..., Path], nnunet_env: Any) -> None:
    """``nnUNetv2_plan_and_preprocess --clean`` after an import with another modality leaves the native cases as old."""
    make(FIRST)
    planned, raw = nnunet_env.preprocessed / FIRST, nnunet_env.raw / FIRST
    folder = planned / "UMITPlans_3d_native"
    assert complete(planned, folder, raw), "without raw images preprocessed ones are enough"
    names = [file.stem for file in folder.glob("*.pkl")]
    (raw / "imagesTr").mkdir(parents=True)
    for name in names:
        (raw / "imagesTr" / f"{name}_0000.nii.gz").touch()
    assert complete(planned, folder, raw)
    (raw / "imagesTr" / "new_0000.nii.gz").touch()
    assert not complete(planned, folder, raw), "a case that is not preprocessed"
    (raw / "imagesTr" / "new_0000.nii.gz").unlink()
    fingerprint = planned / "dataset_fingerprint.json"
    fingerprint.write_text("{}")
    newest = max(file.stat().st_mtime for file in folder.iterdir())
    os.utime(fingerprint, (newest - 60, newest - 60))
    assert complete(planned, folder, raw)
    os.utime(fingerprint, (newest + 60, newest + 60))
    assert not complete(planned, folder, raw), "a fingerprint that is younger than the cases"


def test_a_corpus_has_the_size_that_is_asked_for_and_says_how_to_plan_for_it(make: Callable[..., Path]) -> None:
    folder, console = make(FIRST), Console(record=True, width=200, file=io.StringIO())
    assert json.loads((folder / "UMITPlans.json").read_text())["configurations"]["3d_native"]["umit"]["size"] == "XS"
    build([FIRST], 900, "Corpus", [], 8.0, 1, console, "S")
    planned = json.loads((folder / "UMITPlans.json").read_text())["configurations"]["3d_native"]
    assert planned["umit"]["size"] == "S" and planned["architecture"]["arch_kwargs"]["embed_dim"] == 384
    assert "plan those datasets with -pl UMITPlannerS" in console.export_text()
    with pytest.raises(ValueError, match="--size M must be one of XS, S, B, L"):
        build([FIRST], 900, "Corpus", [], 8.0, 1, console, "M")


def test_opacity_is_no_image(make: Callable[..., Path], nnunet_env: Any) -> None:
    folder = make(COLOUR)
    corpus = Corpus.read(folder / "UMITPlans_3d_native")
    assert corpus is not None
    four = np.arange(7, dtype=np.float32)[:, None, None, None] * np.ones((1, 2, 3, 4), np.float32)
    dataset = CorpusDataset(str(folder / "UMITPlans_3d_native"))
    dataset.open_image = lambda folder, case: four  # type: ignore[method-assign, assignment]
    image = dataset.load_case(corpus.identifiers()[0])[0]
    assert image[(slice(None), 0, 0, 0)].tolist() == [0, 1, 2, 4, 5, 6], "red, green, blue, and the spacing"


def test_weights_are_read_and_refused() -> None:
    names = [FIRST, SECOND]
    assert parse_weights(["911=0.5", f"{SECOND}=3"], names) == {FIRST: 0.5, SECOND: 3.0}
    for bad in ("4=1", "911", "911=-1", "911=nan", "911=x"):
        with pytest.raises(ValueError, match="must be DATASET=FACTOR"):
            parse_weights([bad], names)


def test_colour_is_told_by_channel_names() -> None:
    assert is_colour({"channel_names": {"0": "R", "1": "G", "2": "B"}})
    assert is_colour({"channel_names": dict.fromkeys("012", "rgb_to_0_1")})
    assert not is_colour({"channel_names": {"0": "rgb_to_0_1"}})
    assert is_colour({"channel_names": {"0": "red", "1": "green", "2": "blue"}})
    assert is_colour({"channel_names": {"0": "R", "1": "G", "2": "B", "3": "A"}})
    assert not is_colour({"channel_names": {"0": "T1", "1": "T2", "2": "FLAIR"}})


def test_a_hundred_thousand_images_are_a_small_file(tmp_path: Path) -> None:
    corpus = Corpus(1, [Source("Dataset001_Many", "../many", 1.0, ["ZScoreNormalization"], "CC0")])
    for index in range(100_000):
        corpus.add(0, f"case_{index:06d}", 1, False, (1.0, 1.0, 1.0), (40, 50, 40))
    assert corpus.write(tmp_path).stat().st_size < 12_000_000
    found = Corpus.read(tmp_path)
    assert found is not None and found.case == corpus.case and len(found.identifiers()) == 100_000
