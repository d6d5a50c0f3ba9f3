"""Reading a corpus: a dataset class over the preprocessed cases of several datasets. No label is ever opened."""

from __future__ import annotations

from typing import Any

import numpy as np

from nnunet_umit.architectures.native import SPACING_CHANNELS
from nnunet_umit.plans.corpus import COLOUR, Corpus
from nnunet_umit.trainers.patches import CaseTable, weights_of
from nnunet_umit.trainers.unlabelled import UnlabelledBlosc2


class ChannelView:
    """Some image channels of a stored case (C, D, H, W), and its spacing channels; read when they are sliced."""

    def __init__(self, array: Any, channels: list[int]) -> None:
        self.array = array
        self.channels = [*channels, *range(array.shape[0] - SPACING_CHANNELS, array.shape[0])]

    @property
    def shape(self) -> tuple[int, ...]:
        """(channels, D, H, W)."""
        return len(self.channels), *self.array.shape[1:]

    def __getitem__(self, key: tuple[Any, ...]) -> np.ndarray:
        """A slice of channels and places; a channel that is shown several times is read once."""
        wanted = self.channels[key[0]]
        places = tuple(key[1:])
        read = {channel: np.asarray(self.array[(channel,) + places]) for channel in dict.fromkeys(wanted)}
        return np.stack([read[channel] for channel in wanted])


class CorpusDataset(UnlabelledBlosc2):
    """The images of the corpus in a folder, by the names of :meth:`Corpus.identifiers`."""

    def __init__(self, folder: str, identifiers: list[str] | None = None, **options: Any) -> None:
        self.corpus = corpus_in(folder)
        self.rows = {name: row for row, name in enumerate(self.corpus.identifiers())}
        super().__init__(folder, list(self.rows) if identifiers is None else identifiers, **options)

    @staticmethod
    def get_identifiers(folder: str) -> list[str]:
        """Names of all images."""
        return corpus_in(folder).identifiers()

    def load_case(self, identifier: str) -> tuple[Any, Any, None, dict[str, None]]:
        """Image and spacing channels, lazily read; grey images fill all channels of a corpus with colour images."""
        row, corpus = self.rows[identifier], self.corpus
        data = self.open_image(str(corpus.folder(corpus.source[row])), corpus.case[row])
        stored, channel = data.shape[0] - SPACING_CHANNELS, corpus.channel[row]
        channels = list(range(min(stored, COLOUR))) if channel < 0 else [channel]  # the opacity of RGBA is no image
        view = ChannelView(data, channels * COLOUR if len(channels) < corpus.channels else channels)
        return view, self.no_segmentation(view.shape), None, {"class_locations": None}


def corpus_in(folder: str) -> Corpus:
    """The corpus of a preprocessed folder.

    Raises:
        FileNotFoundError: there is none.
    """
    corpus = Corpus.read(folder)
    if corpus is None:
        raise FileNotFoundError(f"there is no corpus in {folder}; make one with `umit corpus`")
    return corpus


def corpus_table(corpus: Corpus) -> CaseTable:
    """Names, spacings, weights and datasets of all images."""
    groups = [corpus.sources[number].name for number in corpus.source]
    spacings = np.asarray(corpus.spacing, dtype=float)
    return CaseTable(corpus.identifiers(), spacings, weights_of(corpus.weights()), groups)
