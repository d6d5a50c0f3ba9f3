"""A corpus: preprocessed ``3d_native`` cases of several datasets, named in one file and copied nowhere.

Each channel of a case becomes an image of its own (PUMIT, arXiv 2312.07630), and the channels of a case share its
weight; colour images stay whole. A corpus with colour images has three channels, and shows grey images in all three.

The file is columns of JSON next to where preprocessed cases would lie: a hundred thousand images are a few megabytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_umit.files import write_whole

FILE = "corpus.json"
VERSION = 1
COLOUR = 3
AS_COLOUR = ["rgb_to_0_1"] * COLOUR  # what nnU-Net calls the channels of photographs that it scales to 0 .. 1
COLOURS = ({"r", "g", "b"}, {"red", "green", "blue"}, {"r", "g", "b", "a"})  # what is not colour comes last


@dataclass(frozen=True)
class Source:
    """A dataset of a corpus.

    Args:
        name: such as ``Dataset027_ACDC``.
        folder: its preprocessed native cases, relative to the corpus file.
        weight: how often it is drawn, relative to the other datasets.
        normalisation: schemes of its channels.
        licence: as its dataset.json says.
    """

    name: str
    folder: str
    weight: float
    normalisation: list[str]
    licence: str


@dataclass
class Corpus:
    """Sources, and columns with a row an image: ``source``, ``case``, ``channel`` (-1: all), ``spacing``, ``shape``."""

    channels: int
    sources: list[Source]
    source: list[int] = field(default_factory=list)
    case: list[str] = field(default_factory=list)
    channel: list[int] = field(default_factory=list)
    spacing: list[list[float]] = field(default_factory=list)
    shape: list[list[int]] = field(default_factory=list)
    root: Path = Path()

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> Corpus | None:
        """The corpus of a preprocessed folder; None where there is none.

        Raises:
            ValueError: written by another version, or damaged.
        """
        file = Path(folder) / FILE
        if not file.is_file():
            return None
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            version = content.pop("version")
            sources = [Source(**source) for source in content.pop("sources")]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is damaged ({error}); make it again with `umit corpus`") from error
        if version != VERSION:
            raise ValueError(
                f"{file} has version {version}, this package reads {VERSION}; make it again: `umit corpus`"
            )
        return cls(sources=sources, root=Path(folder), **content)

    def write(self, folder: str | os.PathLike[str]) -> Path:
        """Write the file in one step."""
        content = {"version": VERSION, **asdict(self)}
        del content["root"]
        file = Path(folder) / FILE
        write_whole(file, lambda part: part.write_text(json.dumps(content), encoding="utf-8"))
        return file

    def add(self, number: int, case: str, channels: int, colour: bool, spacing: Sequence[float], shape: Any) -> None:
        """Add the images of one case: one, or one for each channel."""
        for channel in [-1] if colour or channels == 1 else range(channels):
            self.source.append(number)
            self.case.append(case)
            self.channel.append(channel)
            self.spacing.append([float(value) for value in spacing])
            self.shape.append([int(size) for size in shape])

    def folder(self, number: int) -> Path:
        """Where the cases of a source lie."""
        return (self.root / self.sources[number].folder).resolve()

    def identifiers(self) -> list[str]:
        """A name for every image, unique: dataset, case, and channel where the case has several."""
        rows = zip(self.source, self.case, self.channel, strict=True)
        return [
            f"{self.sources[number].name}/{case}" + ("" if channel < 0 else f"#{channel}")
            for number, case, channel in rows
        ]

    def weights(self) -> list[float]:
        """Share of every image: its dataset's weight, divided evenly among the dataset's cases and a case's images."""
        images: dict[tuple[int, str], int] = {}
        for key in zip(self.source, self.case, strict=True):
            images[key] = images.get(key, 0) + 1
        cases = [0] * len(self.sources)
        for number, _ in images:
            cases[number] += 1
        return [
            self.sources[number].weight / cases[number] / images[number, case]
            for number, case in zip(self.source, self.case, strict=True)
        ]

    def table(self) -> list[tuple[str, ...]]:
        """For people, a row for each dataset: name, cases, images, spacing, share of the draws."""
        total = sum(source.weight for source in self.sources)
        rows: list[tuple[str, ...]] = []
        for number, source in enumerate(self.sources):
            mine = [row for row, each in enumerate(self.source) if each == number]
            low, high = (reduce([self.spacing[row] for row in mine], 0) for reduce in (np.min, np.max))
            spacing = " x ".join(_span(*pair) for pair in zip(low, high, strict=True))
            cases = len({self.case[row] for row in mine})
            share = f"{100 * source.weight / total:.1f} %"
            rows.append((source.name, str(cases), str(len(mine)), spacing, share))
        return rows


def _span(low: float, high: float) -> str:
    return f"{low:.3g}" if np.isclose(low, high) else f"{low:.3g}-{high:.3g}"


def is_colour(dataset_json: dict[str, Any]) -> bool:
    """Whether the channels of a dataset are those of a photograph, with or without opacity."""
    channels = dataset_json.get("channel_names", dataset_json.get("modality", {}))
    names = [str(name).lower() for name in channels.values()]
    return set(names) in COLOURS or names == AS_COLOUR
