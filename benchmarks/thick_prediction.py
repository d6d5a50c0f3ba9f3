"""Predict folders of images with one trained model: ``python -m benchmarks.thick_prediction JOB.json``.

nnU-Net's own predictor, without mirroring, in one process, so that starting up is paid once for all folders. A folder
that is finished gets a mark; a killed call predicts the one it was in again, whole, because a truncated file reads as
zeros without a word.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import say

DONE = "finished"


def main() -> None:
    """Run the job: ``model``, ``fold``, ``threads``, ``device`` and ``folders`` (pairs of image and output folder)."""
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    predictor = nnUNetPredictor(use_mirroring=False, device=torch.device(job["device"]), allow_tqdm=False)
    # weights only: the trainer of stock Primus cannot load its own checkpoints, its network can
    predictor.initialize_from_trained_model_folder(job["model"], (job["fold"],), "checkpoint_final.pth")
    for images, output in job["folders"]:
        if (Path(output) / DONE).is_file():
            continue
        shutil.rmtree(output, ignore_errors=True)
        Path(output).mkdir(parents=True)
        predictor.predict_from_files_sequential(images, output, save_probabilities=True)
        (Path(output) / DONE).touch()
        say(f"{Path(output).name}: predicted")


if __name__ == "__main__":
    main()
