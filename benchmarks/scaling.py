"""What costs how much: tokens, anisotropy levels, cases in a corpus. Random tensors and synthetic cases, no data.

- ``tokens``: one masked pre-training step of the planner's smallest network (XS) on isotropic images of 175 to 4096
  tokens, CPU seconds and peak memory.
- ``levels``: one pre-training and one fine-tuning step on the same physical volume, cut into 1, 2, 4 and 8 mm slices.
  The token stays near a cube in mm (a thick slice stands for several thin ones), so the number of tokens does not
  change: what falls is the work of the convolutions.
- ``cases``: a corpus of 100 to 100,000 synthetic images (hard links to a few small ones, so the disk plays no part):
  time to open it, batches a second of one process, and memory.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import Results, parser, prepare_torch, provenance, say, table, unusual
from benchmarks.finetune_step import CLASSES, UMIT_PLAN, build, make_step
from benchmarks.mae_step import IMAGES
from benchmarks.mae_step import make_step as make_mae_step
from benchmarks.step_memory import memory_figures, peak_memories
from benchmarks.timing import interleaved, paired_ratio, repeat_line, spread, summarise

CLAIM = "cost of a step by tokens and by anisotropy level, and of a batch by the number of cases in a corpus"
VOLUME_MM = (64, 96, 96)
LEVELS = (0, 1, 2, 3)
CASES, QUICK_CASES = (100, 1_000, 10_000, 100_000), (100, 1_000)
STORED = 8  # different images on disk
BATCHES = 50
SHAPE = (48, 64, 64)  # of a stored image
PATCH = (40, 56, 40)


# ------------------------------------------------------------------------------------------------------- steps
def mae_step(size: tuple[int, ...], spacing: tuple[float, ...], batch: int) -> Callable[[], None]:
    """A masked pre-training step of the XS network."""
    from nnunet_umit.architectures.mae import MaskedAutoencoder
    from nnunet_umit.config import UMITConfig

    torch.manual_seed(0)
    kwargs = UMIT_PLAN["architecture"]["arch_kwargs"] | {"spacing": list(spacing)}
    network = MaskedAutoencoder.from_arch_kwargs(1, kwargs, UMITConfig().pretrain)
    image = torch.randn(batch, 1, *size)
    return make_mae_step(network, lambda: network(image).loss)


def finetune_step(size: tuple[int, ...], spacing: tuple[float, ...], batch: int) -> Callable[[], None]:
    """A fine-tuning step of the XS network."""
    from nnunet_umit.spacing import Anisotropy

    torch.manual_seed(0)
    kwargs = dict(UMIT_PLAN["architecture"]["arch_kwargs"]) | {"spacing": list(spacing)}
    kwargs["strides"] = [list(each) for each in Anisotropy.from_spacing(spacing).strides(kwargs["token_size"])]
    plan = {"architecture": UMIT_PLAN["architecture"] | {"arch_kwargs": kwargs}}
    return make_step("UMIT", build(plan), batch, list(size), {})


def volume_at(level: int) -> tuple[tuple[int, int, int], tuple[float, float, float]]:
    """Voxels and spacing of the volume in slices of ``2**level`` mm."""
    depth, height, width = VOLUME_MM
    return (depth // 2**level, height, width), (float(2**level), 1.0, 1.0)


def measure_tokens(repeats: int, sizes: Mapping[int, tuple[int, ...]]) -> dict[str, Any]:
    """Steps of all image sizes, in turn."""
    threads, spacing = torch.get_num_threads(), (1.0, 1.0, 1.0)
    steps = {str(tokens): mae_step(size, spacing, 2) for tokens, size in sizes.items()}
    samples = interleaved(steps, repeats, 1, repeat_line(repeats))
    builders = {str(tokens): ("benchmarks.scaling:mae_step", size, spacing, 2) for tokens, size in sizes.items()}
    memory = peak_memories(builders, 1, threads)
    found = {name: summarise(each) | memory_figures(memory[name]) for name, each in samples.items()}
    return {"batch_size": 2, "threads": threads, "tokens": found}


def measure_levels(repeats: int) -> dict[str, Any]:
    """Steps of all levels, in turn; ratios are to the level below."""
    from nnunet_umit.spacing import token_grid

    threads = torch.get_num_threads()
    content: dict[str, Any] = {"volume_mm": list(VOLUME_MM), "batch_size": 2, "threads": threads, "classes": CLASSES}
    for name, step in (("pretrain", mae_step), ("finetune", finetune_step)):
        steps = {str(level): step(*volume_at(level), 2) for level in LEVELS}
        samples = interleaved(steps, repeats, 1, repeat_line(repeats))
        found = {}
        for level in LEVELS:
            size, spacing = volume_at(level)
            grid = token_grid(size, [spacing], 8, "relative")
            found[str(level)] = {
                "voxels": int(np.prod(size)),
                "tokens": grid.tokens,
                **summarise(samples[str(level)]),
                "ratio_to_finer": paired_ratio(samples[str(level)], samples[str(max(level - 1, 0))]),
            }
        content[name] = found
    return content


# ------------------------------------------------------------------------------------------------------ corpus
def make_corpus(folder: Path, cases: int) -> Path:
    """A corpus of ``cases`` hard links to a few stored images of several spacings; returns its folder."""
    import blosc2

    from nnunet_umit.architectures.native import append_spacing
    from nnunet_umit.plans.corpus import Corpus, Source

    images, home = folder / "images", folder / f"corpus_{cases}"
    home.mkdir()
    images.mkdir(exist_ok=True)
    spacings = [(1.0 + (number % 4), 1.0, 1.0) for number in range(STORED)]
    for number, spacing in enumerate(spacings):
        stored = folder / f"stored{number}.b2nd"
        if not stored.exists():
            voxels = torch.from_numpy(np.random.default_rng(number).normal(size=(1, *SHAPE)).astype(np.float32))
            array = append_spacing(voxels, spacing).numpy()
            blosc2.asarray(np.ascontiguousarray(array), urlpath=str(stored), chunks=(1, *SHAPE), blocks=(1, 16, 16, 16))
    corpus = Corpus(1, [Source("Dataset001_Synthetic", "../images", 1.0, ["ZScoreNormalization"], "")], root=home)
    for number in range(cases):
        link = images / f"case{number:06d}.b2nd"
        if not link.exists():
            os.link(folder / f"stored{number % STORED}.b2nd", link)
        corpus.add(0, f"case{number:06d}", 1, False, spacings[number % STORED], SHAPE)
    corpus.write(home)
    return home


def open_corpus(home: str) -> Callable[[], object]:
    """Open a corpus as training does; the call makes the next batch."""
    from nnunet_umit.spacing import Anisotropy
    from nnunet_umit.trainers.batches import IndexedBatches
    from nnunet_umit.trainers.corpus import CorpusDataset, corpus_table
    from nnunet_umit.trainers.patches import Augmentation, Jitter, NativeSamples
    from nnunet_umit.trainers.unlabelled import NoLabels

    dataset = CorpusDataset(home)
    samples = NativeSamples(
        dataset,
        corpus_table(dataset.corpus),
        batch_size=4,
        patch=PATCH,
        planned=Anisotropy.from_spacing((1.0, 1.0, 1.0)),
        labels=NoLabels(),
        oversample_foreground=0.0,
        jitter=Jitter(),
        augmentation=Augmentation(),
    )
    batches, index = IndexedBatches(samples, seed=0, stream="train"), iter(range(10**9))
    return lambda: batches[next(index)]


def measure_cases(numbers: tuple[int, ...], batches: int) -> dict[str, Any]:
    """Opening, batches and memory for each number of cases."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for cases in numbers:
            home = str(make_corpus(Path(folder), cases))
            open_corpus(home)  # the first one imports
            began = time.perf_counter()
            batch = open_corpus(home)
            opened = time.perf_counter() - began
            batch()
            samples: list[float] = []
            for _ in range(batches):
                began = time.perf_counter()
                batch()
                samples.append(time.perf_counter() - began)
            memory = peak_memories({"corpus": ("benchmarks.scaling:open_corpus", home)}, 1, threads=1)["corpus"]
            found[str(cases)] = {"open_s": opened, "batch_s": spread(samples), **memory_figures(memory)}
            say(
                f"  {cases} cases: opened in {opened:.2f} s, {1 / found[str(cases)]['batch_s']['median']:.1f} batches/s"
            )
    return {"batch_size": 4, "patch_size": list(PATCH), "batches": batches, "cases": found}


# ------------------------------------------------------------------------------------------------------ report
def _gigabytes(memory: int | None) -> str | None:
    return None if memory is None else f"{memory / 1e9:.2f}"


def report(runs: Mapping[str, Any], mode: str) -> str:
    """Three tables."""
    parts = []
    run = runs.get(f"{mode}/tokens")
    if run:
        rows = [
            [tokens, f"{each['cpu_s']['median']:.2f}", f"{1e3 * each['cpu_s']['median'] / int(tokens):.2f}",
             _gigabytes(each["peak_memory_bytes"])]
            for tokens, each in run["tokens"].items()
        ]  # fmt: skip
        heads = ["tokens", "CPU s a pre-training step", "CPU ms a token", "peak GB"]
        parts.append(table(heads, rows))
    run = runs.get(f"{mode}/levels")
    if run:
        rows = []
        for level in LEVELS:
            pretrain, finetune = (run[name][str(level)] for name in ("pretrain", "finetune"))
            faster = [
                "-" if level == 0 else f"{1 / each['ratio_to_finer']['cpu']['median']:.2f} x"
                for each in (pretrain, finetune)
            ]
            cpu = [f"{each['cpu_s']['median']:.2f}" for each in (pretrain, finetune)]
            rows.append([level, 2**level, pretrain["voxels"], pretrain["tokens"], cpu[0], faster[0], cpu[1], faster[1]])
        heads = [
            "level",
            "slice mm",
            "voxels",
            "tokens",
            "pre-training CPU s",
            "faster than finer",
            "fine-tuning CPU s",
        ]
        parts.append(table([*heads, "faster than finer"], rows))
    run = runs.get(f"{mode}/cases")
    if run:
        rows = [
            [cases, f"{each['open_s']:.2f}", f"{1 / each['batch_s']['median']:.1f}",
             _gigabytes(each["peak_memory_bytes"])]
            for cases, each in run["cases"].items()
        ]  # fmt: skip
        parts.append(table(["cases in the corpus", "s to open", "batches a second, one process", "peak GB"], rows))
    return "\n\n".join(parts)


def main(arguments: list[str] | None = None) -> None:
    """Measure what is not done yet and print the tables."""
    options_parser = parser(__doc__)
    options_parser.add_argument("--repeats", type=int, default=None, help="paired repeats (quick 2, full 9)")
    options: argparse.Namespace = options_parser.parse_args(arguments)
    prepare_torch(options)
    settings = unusual(options_parser, options, "threads", "keep_freed_memory")
    results, mode = Results.of(options, "scaling", CLAIM, settings), "quick" if options.quick else "full"
    repeats = options.repeats or (2 if options.quick else 9)
    sizes = {tokens: IMAGES[tokens] for tokens in ((175, 512) if options.quick else IMAGES)}
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "tokens": lambda: measure_tokens(repeats, sizes),
        "levels": lambda: measure_levels(repeats),
        "cases": lambda: measure_cases(QUICK_CASES if options.quick else CASES, 10 if options.quick else BATCHES),
    }
    for name, measure in parts.items():
        key = f"{mode}/{name}"
        if results.left(key):
            say(f"{key} ...")
            results.put(key, measure() | provenance())
    say(report(results.runs, mode))


if __name__ == "__main__":
    main()
