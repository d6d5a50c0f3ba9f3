"""``umit train ...``: ``nnUNetv2_train`` with the same arguments, as one of the processes that ``torchrun`` started.

    torchrun --nproc-per-node 4 --no-python umit train 900 3d_native all -tr UMITPretrainTrainer -p UMITPlans

Without ``torchrun`` it is ``nnUNetv2_train``. GPUs talk over nccl, CPUs over gloo.
"""

import gc
import os
import sys
from typing import Annotated

import typer


def train(
    arguments: Annotated[list[str] | None, typer.Argument(help="Those of nnUNetv2_train, unchanged.")] = None,
) -> None:
    """Run nnUNetv2_train as one process of torchrun's, on one or several machines.

    The batch of the plans is shared out between the processes. If one of them dies, torchrun ends the others; the last
    checkpoint is whole, and the same command with --c, without -pretrained_weights, goes on from it.
    """
    words = list(arguments or [])
    if "-num_gpus" in words and words[words.index("-num_gpus") + 1 : words.index("-num_gpus") + 2] != ["1"]:
        typer.echo("umit train: torchrun decides how many processes there are; leave -num_gpus away", err=True)
        raise typer.Exit(2)
    sys.argv = ["nnUNetv2_train", *words]
    from nnunetv2.run.run_training import run_training_entry

    if "TORCHELASTIC_RUN_ID" not in os.environ and "WORLD_SIZE" not in os.environ:
        run_training_entry()
        return
    import torch
    from torch import distributed

    on_cpu = "-device" in words and words[words.index("-device") + 1 : words.index("-device") + 2] == ["cpu"]
    if not on_cpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("gloo" if on_cpu else "nccl")
    failed = True
    try:
        run_training_entry()
        failed = False
    finally:
        # The trainer sits in reference cycles and holds the group through DDP's wrapper. A group that outlives this
        # keeps its threads (gloo), and one that needs the interpreter while that shuts down aborts the process. But
        # nccl may wait for all ranks here, and after an error they wait elsewhere: then the error must come out first.
        if on_cpu or not failed:
            gc.collect()
            distributed.destroy_process_group()
