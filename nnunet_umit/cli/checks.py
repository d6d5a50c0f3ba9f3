"""What ``umit doctor`` looks at: versions, the start-up hook, folders, names.

Each check returns :class:`Check` rows, each with a fix where something is wrong, and survives a broken installation.
"""

import os
import re
import shlex
import shutil
import site
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from enum import Enum
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import nnunet_umit
from nnunet_umit import registration

TESTED_NNUNET = "2.8.1"  # pyproject.toml allows it and what follows, but for 3
LOWEST_TORCH = "2.4"  # pyproject.toml
LOW_SPACE_GIB = 10.0  # below it a preprocessed data set or a few checkpoints may not fit
FOLDERS = {  # variable -> whether nnU-Net writes there
    "nnUNet_raw": False,
    "nnUNet_preprocessed": True,
    "nnUNet_results": True,
}
NNUNET = f'pip install "nnunetv2>={TESTED_NNUNET},<3"'
REPORT = "report this with the output of `umit doctor` and of `pip list`"


class State(Enum):
    """Verdict of one check, with its colour in the table."""

    OK = "green"
    NOTE = "yellow"
    WRONG = "red"


@dataclass(frozen=True, kw_only=True)
class Check:
    """One row of the table: what was looked at, what was found, and what to do about it (empty where all is well)."""

    subject: str
    state: State
    finding: str
    fix: str = ""


def shim_folder() -> Path:
    """The folder to put into ``nnUNet_extTrainer`` where the start-up hook cannot work."""
    return Path(nnunet_umit.__file__).resolve().parent / "ext"


def shim_line() -> str:
    """The shell line that makes nnU-Net's training and prediction find UMIT trainers without the hook."""
    return set_line("nnUNet_extTrainer", str(shim_folder()))


def set_line(name: str, value: str) -> str:
    """The line for a shell that sets an environment variable, whatever characters the value has."""
    return f'set "{name}={value}"' if os.name == "nt" else f"export {name}={shlex.quote(value)}"


def numbers(text: str) -> tuple[int, int, int]:
    """The first three numbers of a version, ``"2.8.1rc1+cpu" -> (2, 8, 1)``; missing ones are 0."""
    found = [int(part) for part in re.findall(r"\d+", text.split("+")[0])][:3]
    major, minor, patch = (*found, 0, 0, 0)[:3]
    return major, minor, patch


def check_versions() -> list[Check]:
    """Python, this package, nnU-Net (and whether it was tested with this package) and torch (and its device)."""
    rows = [
        Check(subject="nnunet-umit", state=State.OK, finding=f"{nnunet_umit.__version__} in {shim_folder().parent}"),
        Check(subject="python", state=State.OK, finding=f"{sys.version.split()[0]} in {sys.prefix}"),
        _check_nnunet(),
        _check_torch(),
    ]
    if sys.version_info >= (3, 12):
        try:
            import_module("setuptools")
        except ImportError:
            rows.append(
                Check(
                    subject="setuptools",
                    state=State.WRONG,
                    finding="missing; nnU-Net imports distutils, which Python >= 3.12 only has through setuptools",
                    fix="pip install setuptools",
                )
            )
    return rows


def _check_nnunet() -> Check:
    try:
        found = version("nnunetv2")
    except PackageNotFoundError:
        return Check(subject="nnunetv2", state=State.WRONG, finding="not installed", fix=NNUNET)
    finding = f"{found} (tested: {TESTED_NNUNET})"
    if not numbers(TESTED_NNUNET) <= numbers(found) < (3, 0, 0):
        return Check(subject="nnunetv2", state=State.WRONG, finding=f"{finding}, not supported", fix=NNUNET)
    if numbers(found) > numbers(TESTED_NNUNET):
        fix = f'if something fails: pip install "nnunetv2=={TESTED_NNUNET}"'
        return Check(subject="nnunetv2", state=State.NOTE, finding=f"{finding}, newer than tested", fix=fix)
    return Check(subject="nnunetv2", state=State.OK, finding=finding)


def _check_torch() -> Check:
    try:
        import torch

        device = (
            torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no CUDA: use -device cpu (mps is untested)"
        )
    except Exception as error:  # a broken torch raises anything, from OSError to RuntimeError
        fix = "install torch for your system, see https://pytorch.org/get-started/locally"
        return Check(subject="torch", state=State.WRONG, finding=_one_line(error), fix=fix)
    finding = f"{torch.__version__}, {device}"
    if numbers(torch.__version__) < numbers(LOWEST_TORCH):
        fix = f'pip install "torch>={LOWEST_TORCH}"'
        return Check(subject="torch", state=State.WRONG, finding=f"{finding}, older than {LOWEST_TORCH}", fix=fix)
    return Check(subject="torch", state=State.OK, finding=finding)


def check_hook() -> list[Check]:
    """Whether stock commands see UMIT names in this environment, and by which mechanism."""
    opt_out = os.environ.get(registration.NO_HOOK, "")
    switched_off = opt_out not in ("", "0")
    rows = []
    if registration.mechanism() == registration.START_UP:
        rows.append(Check(subject="start-up hook", state=State.OK, finding=f"active, by {_start_up_file()}"))
    elif switched_off:
        finding = f"not active: {registration.NO_HOOK}={opt_out} is set"
        rows.append(
            Check(subject="start-up hook", state=State.WRONG, finding=finding, fix=f"unset {registration.NO_HOOK}")
        )
    else:
        present = _start_up_file()
        why = "Python skipped it (python -S?)" if present else "nnunet_umit.pth is not in any site-packages folder"
        fix = "pip install --force-reinstall --no-deps . in the folder of nnunet-umit's sources (not with --target)"
        rows.append(Check(subject="start-up hook", state=State.WRONG, finding=f"not active: {why}", fix=fix))
    if switched_off and rows[0].state is State.OK:
        rows.append(Check(subject=registration.NO_HOOK, state=State.NOTE, finding=f"{opt_out}, set after the start"))
    elif not switched_off:
        rows.append(Check(subject=registration.NO_HOOK, state=State.OK, finding=opt_out or "not set"))
    rows.append(_check_shim())
    return rows


def _start_up_file() -> Path | None:
    """The start-up file that this Python reads: ``.start`` from 3.15 on, ``.pth`` before."""
    name = "nnunet_umit.start" if sys.version_info >= (3, 15) else "nnunet_umit.pth"
    folders = [*site.getsitepackages(), site.getusersitepackages(), sysconfig.get_path("purelib")]
    return next((Path(folder, name) for folder in folders if Path(folder, name).is_file()), None)


def _check_shim() -> Check:
    subject = "nnUNet_extTrainer"
    folders = [entry for entry in os.environ.get(subject, "").split(os.pathsep) if entry.strip()]
    missing = [entry for entry in folders if not Path(entry).is_dir()]
    if missing:
        finding = f"names folders that do not exist: {', '.join(missing)}"
        return Check(subject=subject, state=State.NOTE, finding=finding, fix=f"remove them, or: {shim_line()}")
    if any(Path(entry).resolve() == shim_folder() for entry in folders):
        return Check(subject=subject, state=State.OK, finding="set to the UMIT shim (train and predict only)")
    return Check(
        subject=subject, state=State.OK, finding=os.pathsep.join(folders) or "not set, not needed with the hook"
    )


def check_folders() -> list[Check]:
    """nnU-Net's three folders: set, existing, writable where nnU-Net writes, and how much space is left."""
    return [_check_folder(variable, written) for variable, written in FOLDERS.items()]


def _check_folder(variable: str, written: bool) -> Check:
    value = os.environ.get(variable)
    if not value:
        fix = set_line(variable, f"/path/to/{variable}")
        return Check(subject=variable, state=State.WRONG, finding="not set", fix=fix)
    folder = Path(value)
    if not folder.is_dir():
        fix = f'mkdir "{folder}"' if os.name == "nt" else f"mkdir -p {shlex.quote(value)}"
        return Check(subject=variable, state=State.WRONG, finding=f"{folder} does not exist", fix=fix)
    free = shutil.disk_usage(folder).free / 2**30
    finding = f"{folder}, {free:.1f} GiB free"
    if not written:
        return Check(subject=variable, state=State.OK, finding=finding)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        fix = f"chmod u+w {shlex.quote(value)}, or set {variable} to a folder of your own"
        return Check(
            subject=variable, state=State.WRONG, finding=f"cannot write to {folder}: {error.strerror}", fix=fix
        )
    if free < LOW_SPACE_GIB:
        fix = f"free some space, or set {variable} to a folder with more than {LOW_SPACE_GIB:.0f} GiB"
        return Check(subject=variable, state=State.NOTE, finding=finding, fix=fix)
    return Check(subject=variable, state=State.OK, finding=finding)


def check_names() -> list[Check]:
    """Look up every registered name the way nnU-Net does."""
    try:
        import nnunetv2
        from nnunetv2.utilities.find_class_by_name import recursive_find_python_class as find
    except Exception as error:
        finding = f"nnU-Net cannot be imported: {_one_line(error)}"
        return [Check(subject="names", state=State.WRONG, finding=finding, fix=NNUNET)]
    rows = []
    for package, name in registration.REGISTRY:
        folder = os.path.join(nnunetv2.__path__[0], *package.split(".")[1:])
        try:
            found = find(folder, name, package)
        except Exception as error:
            fix = f'python -c "import {registration.REGISTRY[package, name]}" shows where it fails'
            rows.append(Check(subject=name, state=State.WRONG, finding=_one_line(error), fix=fix))
        else:
            rows.append(_check_found(name, found))
    rows.append(_check_pretrained())
    return rows


def _check_found(name: str, found: type | None) -> Check:
    if found is None:
        finding = "nnU-Net's look-up does not know it, although the hook is there"
        return Check(subject=name, state=State.WRONG, finding=finding, fix=REPORT)
    return Check(subject=name, state=State.OK, finding=f"{found.__module__}.{found.__qualname__}")


def _check_pretrained() -> Check:
    subject = "-pretrained_weights"
    try:
        from nnunetv2.run.load_pretrained_weights import load_pretrained_weights as load
    except Exception as error:
        return Check(subject=subject, state=State.WRONG, finding=_one_line(error), fix=REPORT)
    if not getattr(load, "umit_wrapped", False):
        return Check(subject=subject, state=State.WRONG, finding="not handed to UMIT networks", fix=REPORT)
    return Check(subject=subject, state=State.OK, finding="UMIT networks load by their own transfer")


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
