"""Pictures are files that open, with the true aspect ratio, for every kind of image."""

from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from nnunet_umit.trainers import progress as module
from nnunet_umit.trainers.pictures import (
    PAPER,
    TOKENS,
    Panel,
    Reconstruction,
    _extent,
    draw_progress,
    draw_reconstructions,
    draw_usage,
)
from nnunet_umit.trainers.progress import StepProgress


def sample(*shape: int, spacing: tuple[float, ...] = (1.0, 1.0, 1.0), case: str = "case_000") -> Reconstruction:
    image = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    masked = image.copy()
    masked[..., : shape[-1] // 2] = np.nan
    columns = {"input": image, "masked input": masked, "reconstruction": np.nan_to_num(masked)}
    return Reconstruction(case, columns, spacing)


@pytest.mark.parametrize(
    ("shape", "spacing"), [((20, 24, 16), (1.0, 1.0, 1.0)), ((4, 32, 32), (8.0, 1.0, 1.0)), ((24, 40), (0.5, 0.5))]
)
def test_reconstructions_are_drawn(tmp_path: Path, shape: tuple[int, ...], spacing: tuple[float, ...]) -> None:
    path = tmp_path / "reconstructions.png"
    long = "a_name_that_is_longer_than_the_margin_is_wide"
    samples = [sample(*shape, spacing=spacing), sample(*shape, spacing=spacing, case=long)]
    draw_reconstructions(samples, path, title="a title")
    drawn = matplotlib.image.imread(path)
    assert drawn.shape[0] > 100 and drawn.shape[1] > 100
    paper = matplotlib.colors.to_rgb(PAPER)
    assert np.mean(np.abs(drawn[..., :3] - paper).max(-1) > 0.05) > 0.3  # not an empty sheet
    assert [file.name for file in tmp_path.iterdir()] == ["reconstructions.png"]


def test_slices_have_their_size_in_millimetres() -> None:
    thick = sample(6, 16, 20, spacing=(5.0, 1.0, 2.0))
    assert [_extent(thick, axis) for axis in range(3)] == [(16, 40), (30, 40), (30, 16)]
    assert _extent(sample(10, 20, spacing=(999.0, 2.0, 1.0)), None) == (20, 20)  # a 2D image takes the in-plane spacing


def test_constant_and_broken_images_are_drawn(tmp_path: Path) -> None:
    constant = np.zeros((8, 8), np.float32)
    broken = np.full((8, 8), np.nan, np.float32)
    samples = [
        Reconstruction("constant", {"input": constant, "masked input": broken, TOKENS: constant}, (1.0, 1.0)),
        Reconstruction("broken", {"input": broken, "masked input": broken, TOKENS: broken}, (1.0, 1.0)),
    ]
    draw_reconstructions(samples, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 0


def test_the_use_of_a_codebook_is_drawn(tmp_path: Path) -> None:
    draw_usage([0.5, 0.25, 0.25, 0.0], tmp_path / "codebook.png", "a title")
    assert matplotlib.image.imread(tmp_path / "codebook.png").shape[0] > 100


@pytest.mark.parametrize("epochs", [1, 2, 40])
def test_progress_is_drawn(tmp_path: Path, epochs: int) -> None:
    curve = [1 / (1 + epoch) for epoch in range(epochs)]
    curve[0] = float("nan")
    panels = [Panel("loss", {"training": curve, "validation": curve}, level=1.0), Panel("rate", {"": curve})]
    draw_progress(panels, tmp_path / "progress.png", "a title")
    assert matplotlib.image.imread(tmp_path / "progress.png").shape[0] > 100


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(module, "monotonic", lambda: clock[0])
    monkeypatch.setattr(module.sys.stdout, "isatty", lambda: False, raising=False)
    lines: list[str] = []
    shown = StepProgress(lines.append)
    shown.start("epoch 3, training", 10)
    for _ in range(10):
        clock[0] += 25.0
        shown.advance("loss 0.5")
    assert lines == [
        "epoch 3, training: step 3 of 10, loss 0.5, 25.00 s a step",
        "epoch 3, training: step 6 of 10, loss 0.5, 25.00 s a step",
        "epoch 3, training: step 9 of 10, loss 0.5, 25.00 s a step",
    ]
    quiet = StepProgress(lines.append, shown=False)
    quiet.start("epoch 4, training", 3)
    clock[0] += 1000
    quiet.advance()
    assert len(lines) == 3


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(module.sys.stdout, "isatty", lambda: True, raising=False)
    shown = StepProgress(lines.append)
    shown.start("epoch 0, training", 2)
    assert shown._bar is not None
    shown.advance("loss 0.5")
    assert shown._bar.tasks[0].completed == 1 and shown._bar.tasks[0].fields["note"] == "loss 0.5"
    shown.stop()
    shown.stop()
    assert shown._bar is None and not lines
