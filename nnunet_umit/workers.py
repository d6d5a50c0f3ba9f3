"""Worker processes that start in a moment.

nnU-Net starts the workers of preprocessing, export and evaluation with ``spawn``: each of them imports torch and
nnU-Net again, seconds of a core for every worker. Python's own ``forkserver`` (the default of Python 3.14 on Linux)
imports them once, in a clean process that never computes anything, and forks the workers from that. What a worker does,
and what it is given, is the same.
"""

from __future__ import annotations

import multiprocessing
import sys
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

STARTING = (  # modules of nnU-Net that start workers
    "nnunetv2.evaluation.evaluate_predictions",
    "nnunetv2.inference.data_iterators",
    "nnunetv2.inference.predict_from_raw_data",
    "nnunetv2.preprocessing.preprocessors.default_preprocessor",
    "nnunetv2.training.nnUNetTrainer.nnUNetTrainer",
)
IMPORTED = (  # what the commands import, and so every worker of theirs
    "nnunetv2.experiment_planning.plan_and_preprocess_api",
    "nnunetv2.inference.predict_from_raw_data",
    "nnunetv2.run.run_training",
    "nnunetv2.training.nnUNetTrainer.nnUNetTrainer",
    "nnunet_umit.plans.preprocessor",
)
EARLY = ("nnunetv2.inference.predict_from_raw_data", "nnunet_umit.plans.preprocessor")  # what prediction imports


class ForkingMultiprocessing:
    """The module :mod:`multiprocessing`, with a fork server where spawned processes are asked for."""

    def __getattr__(self, name: str) -> Any:
        return getattr(multiprocessing, name)

    def get_context(self, method: str | None = None) -> BaseContext:
        """As :func:`multiprocessing.get_context`, but for ``"spawn"``; a server starts with its first worker."""
        if method != "spawn":
            return multiprocessing.get_context(method)
        started = start_server([name for name in IMPORTED if name in sys.modules])
        return multiprocessing.get_context("forkserver" if started else method)


def start_server(imports: list[str]) -> bool:
    """Have a fork server that imports these modules, unless there is one; whether there is one now."""
    multiprocessing.set_forkserver_preload(["nnunet_umit.server_path", *imports])
    try:
        forkserver.ensure_running()
    except OSError as error:  # no sockets or processes to be had; nnU-Net's own way may still work, or says more
        print(f"nnunet-umit: no fork server ({error}); nnU-Net's workers start more slowly", file=sys.stderr)
        return False
    return True


def _may_serve() -> bool:
    """On Linux, and neither in a worker nor in a fork server.

    Both import what the command does, newer Pythons under the command's ``sys.argv``, so each server would start the
    next one. While they import, only the command line that Python gave them tells them apart.
    """
    is_started = any(word.startswith("from multiprocessing.") for word in sys.orig_argv)
    return sys.platform == "linux" and multiprocessing.parent_process() is None and not is_started


def start_for_prediction(command: list[str]) -> bool:
    """Start the fork server while this process still imports nnU-Net, not after it: seconds, on two cores.

    Args:
        command: ``sys.argv`` that names a UMIT model. Only stock prediction gets a server, and only if it uses workers.

    Returns:
        Whether a server was started.
    """
    program, *words = command
    predicts = Path(program).name.startswith("nnUNetv2_predict")
    alone = ("-npp", "0") in zip(words, words[1:], strict=False)
    return predicts and not alone and _may_serve() and start_server(list(EARLY))


def use_fork_server() -> bool:
    """Let the nnU-Net modules that this process has imported start their workers from a fork server.

    Returns:
        Whether it was done: on Linux only (macOS's libraries do not like to be forked, Windows cannot), and not in
        worker processes, which start no workers.
    """
    if not _may_serve():
        return False
    for name in STARTING:
        module = sys.modules.get(name)
        if getattr(module, "multiprocessing", None) is multiprocessing:
            module.multiprocessing = ForkingMultiprocessing()  # type: ignore[union-attr]
    return True


def preprocess_from_files(*args: Any, **kwargs: Any) -> Any:
    """nnU-Net's function of the same purpose, in a worker that has no start-up hook."""
    return _registered("preprocess_fromfiles_save_to_queue", *args, **kwargs)


def preprocess_from_arrays(*args: Any, **kwargs: Any) -> Any:
    """nnU-Net's function of the same purpose, in a worker that has no start-up hook."""
    return _registered("preprocess_fromnpy_save_to_queue", *args, **kwargs)


def _registered(name: str, *args: Any, **kwargs: Any) -> Any:
    from nnunet_umit.registration import register

    register()
    from nnunetv2.inference import data_iterators

    function = getattr(data_iterators, name)
    return getattr(function, "umit_original", function)(*args, **kwargs)


PREPARING = {
    "preprocess_fromfiles_save_to_queue": preprocess_from_files,
    "preprocess_fromnpy_save_to_queue": preprocess_from_arrays,
}
