"""``nnUNetv2_predict`` with a stop-watch: ``python -m benchmarks.timed_predict REPORT.json STARTED [arguments]``.

Runs the stock command in one process (meant for ``-npp 0 -nps 0``) and writes where its wall time went. STARTED is
the time (seconds since 1970) at which the caller started this process, so that the start of Python counts.

    start-up       Python, imports, arguments, trainer look-up, network and weights
    preprocessing  reading, cropping, normalising, resampling
    network        the sliding window
    resampling     of the logits to the image's grid
    export         argmax, crop undone, compression, writing
    rest           everything else
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import write_json

PARTS = ("start-up", "preprocessing", "network", "resampling", "export", "rest")


class StopWatch:
    """Seconds by part; what a part calls counts for the innermost."""

    def __init__(self, started: float) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.since, self.open = started, ["start-up"]

    def switch(self, now: float) -> None:
        """Give the time since the last switch to the innermost open part."""
        self.seconds[self.open[-1]] += now - self.since
        self.since = now

    def timing(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, whose calls count for ``part``."""

        @functools.wraps(function)
        def timed(*given: Any, **named: Any) -> Any:
            self.switch(time.time())
            self.open.append(part)
            try:
                return function(*given, **named)
            finally:
                self.switch(time.time())
                self.open.pop()

        return timed


def main() -> None:
    """Run the command."""
    report, watch = Path(sys.argv[1]), StopWatch(float(sys.argv[2]))
    sys.argv = ["nnUNetv2_predict", *sys.argv[3:]]
    from nnunetv2.inference import predict_from_raw_data as stock
    from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

    predictor = stock.nnUNetPredictor
    sequential = predictor.predict_from_files_sequential

    @functools.wraps(sequential)  # it looks up its own signature
    def begin(self: Any, *given: Any, **named: Any) -> Any:
        watch.switch(time.time())
        watch.open[0] = "rest"
        manager = self.configuration_manager.preprocessor_class
        manager.run_case = watch.timing("preprocessing", manager.run_case)
        return sequential(self, *given, **named)

    predictor.predict_from_files_sequential = begin
    network = watch.timing("network", predictor.predict_logits_from_preprocessed_data)
    predictor.predict_logits_from_preprocessed_data = network
    stock.export_prediction_from_logits = watch.timing("export", stock.export_prediction_from_logits)
    resampling = ConfigurationManager.resampling_fn_probabilities.fget

    def of_probabilities(manager: Any) -> Callable[..., Any]:
        return watch.timing("resampling", resampling(manager))

    ConfigurationManager.resampling_fn_probabilities = property(of_probabilities)
    stock.predict_entry_point()
    watch.switch(time.time())
    write_json(report, watch.seconds)


if __name__ == "__main__":
    main()
