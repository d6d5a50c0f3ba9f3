"""Cost of training steps beside the peers': ``mae_step`` (pre-training) and ``finetune_step``, one after the other."""

from __future__ import annotations

from benchmarks import finetune_step, mae_step


def main(arguments: list[str] | None = None) -> None:
    """Run both with the same options (those that all benchmarks have, and ``--repeats``)."""
    mae_step.main(arguments)
    finetune_step.main(arguments)


if __name__ == "__main__":
    main()
