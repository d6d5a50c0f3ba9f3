"""What no single file can know: which images are the same, and which kind of image the dataset is of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from nnunet_umit.importing.verdict import Case, Kind, Rejection

Group = tuple[int, str, int]  # dimension, reader, channels


def settle(cases: Iterable[Case]) -> tuple[list[Case], list[Rejection]]:
    """Keep one of each image, and of these the most frequent dimension, reader and number of channels.

    The result does not depend on the order of `cases`: of equal images the first by relative path stays, of equally
    frequent kinds the one with more dimensions.

    Returns:
        Cases by name, and the rejected rest.
    """
    firsts: dict[str, Case] = {}
    rejections = []
    for case in sorted(cases, key=lambda case: case.relative):
        first = firsts.setdefault(case.digest, case)
        if first is not case:
            reason = f"holds the same voxels as {first.path}"
            rejections.append(_reject(case, Kind.DUPLICATE, reason, "Nothing to do: the other one is imported"))
    if not firsts:
        return [], rejections
    counts = Counter(map(_group, firsts.values()))
    winner = max(counts, key=lambda group: (counts[group], group))
    for case in firsts.values():
        if _group(case) != winner:
            reason = f"{_describe(_group(case))} among {counts[winner]} images that are {_describe(winner)}"
            fix = "Move such images to a folder of their own and import that as another dataset"
            rejections.append(_reject(case, Kind.DIMENSION, reason, fix))
    kept = [case for case in firsts.values() if _group(case) == winner]
    return sorted(kept, key=lambda case: case.name), rejections


def _group(case: Case) -> Group:
    return case.dimension, case.reader, case.channels


def _describe(group: Group) -> str:
    dimension, reader, channels = group
    container = {"NaturalImage2DIO": "pictures (PNG, TIFF)", "SimpleITKIO": "volume files"}[reader]
    return f"{dimension}D {container} with {channels} channel{'s' if channels > 1 else ''}"


def _reject(case: Case, kind: Kind, reason: str, fix: str) -> Rejection:
    return Rejection(path=case.path, kind=kind, reason=reason, fix=fix)
