"""Running stock nnU-Net commands as sub-processes: progress while they run, a log file each, readable errors."""

import os
import re
import signal
import site
import subprocess
import sys
import sysconfig
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from nnunet_umit.registration import START_UP, mechanism

TAIL_LINES = 15
_EPOCH = re.compile(r"\bEpoch (\d+)\b")
_TIME_STAMP = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(\.\d+)?:\s*")


class StockCommandError(RuntimeError):
    """A stock command is missing or failed; the message names it, its last lines and its log file."""


class Step(NamedTuple):
    """One finished step: what it did and its wall time in seconds."""

    title: str
    seconds: float


def find_command(name: str) -> Path:
    """Find a console script of the running environment.

    ``PATH`` may lead to another environment's nnU-Net, which would not know UMIT; therefore only the folders in
    which the running interpreter installs its scripts are searched.

    Args:
        name: Name of the console script, e.g. ``nnUNetv2_train``.

    Raises:
        StockCommandError: When none of those folders holds it.
    """
    folders = [Path(sys.executable).parent, Path(sysconfig.get_path("scripts"))]
    if site.ENABLE_USER_SITE:  # pip install --user; a virtual environment does not see what is there
        folders.append(Path(sysconfig.get_path("scripts", sysconfig.get_preferred_scheme("user"))))
    for folder in folders:
        for file_name in (name, f"{name}.exe"):
            if (folder / file_name).is_file():
                return folder / file_name
    raise StockCommandError(
        f"{name} is not installed next to {sys.executable} (looked in {', '.join(map(str, dict.fromkeys(folders)))}). "
        f'Install nnU-Net there: "{sys.executable}" -m pip install nnunetv2'
    )


def start_of(command: str) -> list[str]:
    """The first words of a stock command: its console script, or ``umit run`` where no start-up file tells it of UMIT
    (``NNUNET_UMIT_NO_HOOK``, ``pip install --target``).

    Raises:
        StockCommandError: as :func:`find_command`.
    """
    if mechanism() == START_UP:
        return [str(find_command(command))]
    return [sys.executable, "-m", "nnunet_umit.cli.app", "run", command]


def stock_environment(raw: Path, preprocessed: Path, results: Path, *, cores: int | None = None) -> dict[str, str]:
    """Environment of a sub-process: nnU-Net's three folders and process counts that suit a small machine.

    nnU-Net starts eight export processes and up to twelve loaders by default, each of which imports PyTorch for
    seconds; on small data they cost more than they give. Its own set-up gives training all cores, so one OpenMP
    thread for each of the other processes keeps them from crowding the machine. Waiting threads sleep: where training
    shares its cores with loaders, threads that spin waste several times what the training itself needs (measured).
    The caller's environment stays as it is.
    """
    cores = cores or os.cpu_count() or 1
    environment = dict(os.environ)
    environment.update(
        nnUNet_raw=str(raw),
        nnUNet_preprocessed=str(preprocessed),
        nnUNet_results=str(results),
        nnUNet_def_n_proc=str(min(max(1, cores // 2), 2)),
        nnUNet_n_proc_DA=str(min(max(1, cores // 2), 4)),
        OMP_NUM_THREADS="1",
        OMP_WAIT_POLICY="PASSIVE",
        MPLBACKEND="Agg",
        PYTHONUNBUFFERED="1",
    )
    return environment


class StockRunner:
    """Runs steps one after another, shows how far they are, and remembers how long each took.

    Args:
        console: Where progress goes: a live bar in a terminal, one line at start and end otherwise.
        log_folder: Receives the whole output of each command as ``NN_<name>.log``.
        total: Number of steps to come, for the ``[3/9]`` in front of each title.
    """

    def __init__(self, console: Console, log_folder: Path, total: int) -> None:
        self.console = console
        self.log_folder = log_folder
        self.total = total
        self.steps: list[Step] = []
        log_folder.mkdir(parents=True, exist_ok=True)

    def run(
        self,
        title: str,
        command: str,
        *arguments: str | Path,
        environment: Mapping[str, str],
        epochs: int | None = None,
    ) -> None:
        """Run one stock command to its end.

        Args:
            title: What the command does, for people.
            command: Name of the console script.
            arguments: Its arguments.
            environment: Its whole environment.
            epochs: Number of epochs of a training, which makes the bar determinate.

        Raises:
            StockCommandError: When the command is missing or ends with an error.
        """
        words = [*start_of(command), *map(str, arguments)]
        shown = " ".join([command, *map(str, arguments)])
        log = self.log_folder / f"{len(self.steps) + 1:02d}_{command}.log"
        tail: deque[str] = deque(maxlen=TAIL_LINES)
        with self.step(title, epochs) as show, log.open("w", encoding="utf-8") as file:
            file.write(f"$ {shown}\n")
            file.flush()
            code = _run(words, environment, file, tail, show)
            if code != 0:
                lines = "\n".join(f"    {line}" for line in tail) or "    (no output)"
                raise StockCommandError(
                    f"{shown}\nended with exit code {code}. Its last lines:\n{lines}\nThe whole output: {log}"
                )

    @contextmanager
    def step(self, title: str, epochs: int | None = None) -> "Iterator[_Progress]":
        """Show and time one step of the journey; ``run`` uses it for commands, callers for work of their own.

        Yields:
            The function to tell lines of output to.
        """
        label = escape(f"[{len(self.steps) + 1}/{self.total}] {title}")
        start = time.monotonic()
        with _Progress(self.console, label, epochs) as show:
            yield show
        self.steps.append(Step(title, time.monotonic() - start))
        self.console.print(f"{label}  [green]done[/green] in {self.steps[-1].seconds:.0f} s", highlight=False)


class _Progress:
    """A context that returns the function which is told every line of output."""

    def __init__(self, console: Console, label: str, epochs: int | None) -> None:
        self.console = console
        self.label = label
        self.epochs = epochs
        self.bar: Progress | None = None

    def __enter__(self) -> "_Progress":
        if not self.console.is_terminal:
            self.console.print(f"{self.label} ...", highlight=False)
            return self
        self.bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[last]}[/dim]"),
            console=self.console,
            transient=True,
        )
        self.bar.start()
        self.task = self.bar.add_task(self.label, total=self.epochs, last="")
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, line: str) -> None:
        if self.bar is None:
            return
        text = _TIME_STAMP.sub("", line)
        epoch = _EPOCH.search(text)
        if epoch and self.epochs:
            self.bar.update(self.task, completed=min(int(epoch.group(1)), self.epochs))
        self.bar.update(self.task, last=escape(text[:60]))


def _run(words: list[str], environment: Mapping[str, str], log: TextIO, tail: deque[str], show: _Progress) -> int:
    posix = os.name == "posix"
    process = subprocess.Popen(
        words,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=posix,
    )
    try:
        for line in _lines(process):
            log.write(line + "\n")
            log.flush()
            if line.strip():
                tail.append(line.rstrip())
                show(line.strip())
        return process.wait()
    finally:
        if process.poll() is None:  # interrupted: nnU-Net's loaders and exporters must not outlive the demo
            if posix:
                os.killpg(process.pid, signal.SIGTERM)
            else:
                process.terminate()
            process.wait()


def _lines(process: "subprocess.Popen[bytes]") -> Iterator[str]:
    """Lines of the output as they come; a carriage return (progress bars) ends a line too."""
    if process.stdout is None:
        raise RuntimeError("the sub-process was started without a pipe for its output")
    rest = b""
    while chunk := os.read(process.stdout.fileno(), 65536):
        *whole, rest = re.split(rb"[\r\n]+", rest + chunk)
        for line in whole:
            yield line.decode("utf-8", errors="replace")
    if rest:
        yield rest.decode("utf-8", errors="replace")
