"""Spacing-aware self-pretraining and fine-tuning inside nnU-Net.

This module is imported at every start of Python in the environment (see ``registration``), so it must stay free of
imports: everything but the version is fetched on first use.
"""

__version__ = "0.1.0"

__all__ = ["__version__", "register"]


def __getattr__(name: str) -> object:
    """Fetch ``register`` on first use, so that ``import nnunet_umit`` imports nothing else."""
    if name == "register":
        from nnunet_umit.registration import register

        return register
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
