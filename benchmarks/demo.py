"""``umit demo``, timed end to end, as the README shows it: what its two arms reach, and how long everything takes."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Mapping
from typing import Any

from benchmarks.common import Results, parser, provenance, say, table, work_folder
from nnunet_umit.cli.stock import find_command

CLAIM = "umit demo runs the whole journey on embedded data in minutes on two cores"


def run(minutes: float, work: str | None) -> dict[str, Any]:
    """Run the demo in a new folder; returns its own figures and the wall time of the command."""
    out = work_folder(work) / "umit_demo"
    shutil.rmtree(out, ignore_errors=True)
    began = time.perf_counter()
    command = [str(find_command("umit")), "demo", "--out", str(out), "--minutes", str(minutes), "--device", "cpu"]
    subprocess.run(command, check=True)
    wall = time.perf_counter() - began
    found = json.loads((out / "umit_demo.json").read_text(encoding="utf-8"))
    kept = {name: found[name] for name in ("configuration", "steps", "dice", "seconds")}
    return {"minutes": minutes, "wall_s": wall, "test_cases": len(found["cases"]["test"]), **kept, **provenance()}


def report(run: Mapping[str, Any]) -> str:
    """A sentence and the times."""
    scratch, pretrained = (run["dice"][arm]["mean"] for arm in ("from scratch", "pre-trained"))
    steps = run["steps"]
    level = f"{pretrained:.3f}" == f"{scratch:.3f}"
    order = "level with" if level else "behind" if pretrained < scratch else "ahead of"
    sentence = (
        f"With {steps['finetune_steps']} steps on four labelled cases and {steps['pretrain_steps']} steps of "
        f"pre-training, the pre-trained arm ended {order} the one from scratch: mean Dice {pretrained:.3f} against "
        f"{scratch:.3f} on {run['test_cases']} held-out cases, after {run['wall_s'] / 60:.1f} minutes in all."
    )
    return sentence


def main(arguments: list[str] | None = None) -> None:
    """Run the demo unless its result is stored, and print what it found."""
    options_parser = parser(__doc__)
    options_parser.add_argument("--work", default=None, help="scratch folder")
    options = options_parser.parse_args(arguments)
    results, key = Results.of(options, "demo", CLAIM), "quick" if options.quick else "full"
    if results.left(key):
        results.put(key, run(0.5 if options.quick else 5.0, options.work))
    found = results.get(key)
    say(report(found))
    say(table(["step", "wall s"], list(found["seconds"].items())))


if __name__ == "__main__":
    main()
