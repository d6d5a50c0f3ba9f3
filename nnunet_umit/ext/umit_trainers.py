"""UMIT trainers for nnU-Net's own extension variable, where the start-up hook cannot work.

``export nnUNet_extTrainer=<folder of this file>``; ``umit doctor`` prints the line. nnU-Net forgets every module it
imports from such a folder, so nothing is defined here: the classes come from the installed package, and their identity
and pickling survive. Planners cannot be found this way; ``umit run nnUNetv2_plan_and_preprocess ...`` finds them.
"""

from importlib import import_module

from nnunet_umit.registration import REGISTRY, TRAINERS, register

register()  # for -pretrained_weights


def __getattr__(name: str) -> object:
    if (TRAINERS, name) in REGISTRY:
        return getattr(import_module(REGISTRY[TRAINERS, name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
