"""How nnU-Net's own commands find ``UMIT*`` names, with nothing but ``pip install``.

nnU-Net looks up trainers, planners and preprocessors by walking its own folders; only trainers may live elsewhere, and
only behind an environment variable. This module teaches that look-up our names instead:

* ``nnunet_umit.pth`` (Python <= 3.17) or ``nnunet_umit.start`` (Python >= 3.15, PEP 829) call :func:`install` when the
  interpreter starts, in workers and distributed ranks as well. That puts one finder on ``sys.meta_path`` and imports
  nothing; it must stay far below a millisecond, because every Python program of the environment pays for it.
* When nnU-Net imports its look-up, or its loader of pre-trained weights, the finder lets the module load and then wraps
  the function in question. A name in :data:`REGISTRY` is imported from here, everything else is nnU-Net's business.

A failure to patch never stops a program: it is one line on stderr. ``NNUNET_UMIT_NO_HOOK=1`` switches the start-up hook
off; :func:`register` (notebooks, ``pip install --target``, ``umit run``) is an explicit request and ignores it.
"""

import _thread  # built in, part of every start
import os  # already imported when Python runs start-up files
import sys

TYPE_CHECKING = False  # importing typing would cost more than all the rest
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

__all__ = [
    "NO_HOOK",
    "PLANNERS",
    "PREPROCESSORS",
    "REGISTRY",
    "TRAINERS",
    "install",
    "is_active",
    "mechanism",
    "register",
]

NO_HOOK = "NNUNET_UMIT_NO_HOOK"

TRAINERS = "nnunetv2.training.nnUNetTrainer"
PLANNERS = "nnunetv2.experiment_planning"
PREPROCESSORS = "nnunetv2.preprocessing"

# (package that nnU-Net searches, class name) -> module of ours that defines the class
REGISTRY = {
    (TRAINERS, "UMITTrainer"): "nnunet_umit.trainers.finetune",
    (TRAINERS, "UMITPretrainTrainer"): "nnunet_umit.trainers.pretrain",
    (TRAINERS, "UMITTokenizerTrainer"): "nnunet_umit.trainers.tokenizer",
    (TRAINERS, "UMITSoftTokenPretrainTrainer"): "nnunet_umit.trainers.soft_tokens",
    (PLANNERS, "UMITPlanner"): "nnunet_umit.plans.planner",
    (PLANNERS, "UMITPlannerS"): "nnunet_umit.plans.planner",
    (PLANNERS, "UMITPlannerB"): "nnunet_umit.plans.planner",
    (PLANNERS, "UMITPlannerL"): "nnunet_umit.plans.planner",
    (PREPROCESSORS, "UMITPreprocessor"): "nnunet_umit.plans.preprocessor",
    (PREPROCESSORS, "UMITNativePreprocessor"): "nnunet_umit.plans.preprocessor",
}

# What nnU-Net's predictor gets in place of a trainer: the network of a plan, without all that training imports.
PREDICTION = {"UMITTrainer": ("nnunet_umit.plans.network", "PlannedSegmenter")}

PREDICTOR = "nnunetv2.inference.predict_from_raw_data"

_ROOMS = {  # what nnU-Net calls the thing, and the option that names it on the command line
    TRAINERS: ("trainer", "-tr"),
    PLANNERS: ("planner", "-pl"),
    PREPROCESSORS: ("preprocessor", "-preprocessor_name"),
}

START_UP = "start-up file"
BY_CALL = "register()"


def install() -> None:
    """Put the hook in place without importing anything; called when Python starts. Never raises."""
    try:
        if os.environ.get(NO_HOOK, "") in ("", "0"):
            _add_finder(START_UP)
    except Exception as error:
        _complain("the start-up hook", error)


def register() -> None:
    """Make nnU-Net find UMIT names in this process, now and in what it imports later.

    Does what the start-up hook does, and also patches nnU-Net modules that are imported already. Calling it twice, or
    with the hook active, changes nothing.
    """
    _add_finder(BY_CALL)
    for name, patch in _PATCHES.items():
        module = sys.modules.get(name)
        if module is not None:
            patch(module)


def is_active() -> bool:
    """Whether nnU-Net modules imported from now on get patched."""
    return mechanism() is not None


def mechanism() -> "str | None":
    """What put the hook in place: ``"start-up file"``, ``"register()"`` or None where there is none."""
    for finder in sys.meta_path:
        origin = getattr(finder, "umit_mechanism", None)
        if origin is not None:
            return str(origin)
    return None


def _add_finder(origin: str) -> None:
    if not is_active():
        sys.meta_path.insert(0, _Finder(origin))  # type: ignore[arg-type]  # typeshed wants a subclass of a lazy import


def _complain(what: str, error: BaseException) -> None:
    text = " ".join(str(error).split())
    print(f"nnunet-umit: {what} failed ({type(error).__name__}: {text}); `umit doctor` explains.", file=sys.stderr)


class _Finder:
    """Answers only for the modules in ``_PATCHES``, with the other finders' answer and a loader that patches.

    It stays on ``sys.meta_path`` after answering, so that a mere ``importlib.util.find_spec`` probe does not use it up.
    """

    def __init__(self, origin: str) -> None:
        self.umit_mechanism = origin
        self._busy: set[tuple[str, int]] = set()  # (module, thread): other hooks may ask us in turn

    def find_spec(
        self, fullname: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        patch = _PATCHES.get(fullname)
        if patch is None:
            return None
        key = (fullname, _thread.get_ident())
        if key in self._busy:
            return None
        self._busy.add(key)
        try:
            if fullname == PREDICTOR:
                _prepare_prediction()
            for finder in list(sys.meta_path):
                find_spec = None if finder is self else getattr(finder, "find_spec", None)
                spec: ModuleSpec | None = None if find_spec is None else find_spec(fullname, path, target)
                if spec is not None:
                    if hasattr(spec.loader, "exec_module"):
                        spec.loader = _Loader(spec.loader, patch)  # type: ignore[assignment]  # duck-typed, as above
                    return spec
        finally:
            self._busy.discard(key)
        return None


class _Loader:
    """The real loader, plus one patch once the module has run."""

    def __init__(self, loader: "Any", patch: "Callable[[ModuleType], None]") -> None:
        self._loader = loader
        self._patch = patch

    def __getattr__(self, name: str) -> "Any":
        return getattr(self._loader, name)

    def create_module(self, spec: "ModuleSpec") -> "ModuleType | None":
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: "ModuleType") -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        try:
            self._patch(module)
        except Exception as error:
            _complain(f"patching {module.__name__}", error)


def _patch_lookup(module: "ModuleType") -> None:
    """Wrap nnU-Net's look-up by name, under both of its names.

    The public one answers before nnU-Net extends ``sys.path`` and walks its modules (5 s). The private one is looked up
    in the module at each call, so it also serves callers that imported the public one before it was wrapped.
    """
    found = [_wrap(module, name, _lookup) for name in ("recursive_find_python_class", "_recursive_find_python_class")]
    if not any(found):
        raise AttributeError(f"{module.__name__} has no recursive_find_python_class; this nnU-Net is not supported")


def _patch_pretrained(module: "ModuleType") -> None:
    """Wrap the loader behind ``-pretrained_weights``."""
    if not _wrap(module, "load_pretrained_weights", _load_pretrained):
        raise AttributeError(f"{module.__name__} has no load_pretrained_weights; this nnU-Net is not supported")


def _patch_training(module: "ModuleType") -> None:
    """Wrap the function behind ``nnUNetv2_train`` that opens the plans; without it only an error is less clear."""
    _wrap(module, "get_trainer_from_args", _get_trainer)


def _patch_comparison(module: "ModuleType") -> None:
    """Wrap the check behind ``nnUNetv2_find_best_configuration``; without it UMIT cannot be compared with nnU-Net."""
    _wrap(module, "filter_available_models", _filter_models)


def _patch_prediction(module: "ModuleType") -> None:
    """Wrap the look-up of trainers in nnU-Net's predictor, there only; without it prediction starts more slowly."""
    _wrap(module, "recursive_find_trainer_class_by_name", _find_for_prediction, everywhere=False)


def _patch_workers(module: "ModuleType") -> None:
    """Give the processes that prepare images for a prediction what this one has been given by :func:`register`.

    They look for the preprocessor by its name as well, and start without a hook where no start-up file brings one.
    """
    if mechanism() == START_UP:
        return
    from nnunet_umit.workers import PREPARING

    for name, own in PREPARING.items():
        original = getattr(module, name, None)
        if original is not None and original is not own:
            own.umit_original = original  # type: ignore[attr-defined]
            setattr(module, name, own)


def _prepare_prediction() -> None:
    """Before nnU-Net's predictor is imported: start what the workers of a UMIT prediction will come from."""
    try:
        if any(trainer in word for trainer in PREDICTION for word in sys.argv[1:]):
            from nnunet_umit.workers import start_for_prediction

            start_for_prediction(sys.argv)
    except Exception as error:
        _complain("starting the workers' server early", error)


_PATCHES = {
    "nnunetv2.utilities.find_class_by_name": _patch_lookup,
    "nnunetv2.run.load_pretrained_weights": _patch_pretrained,
    "nnunetv2.run.run_training": _patch_training,
    "nnunetv2.evaluation.find_best_configuration": _patch_comparison,
    PREDICTOR: _patch_prediction,
    "nnunetv2.inference.data_iterators": _patch_workers,
}


def _wrap(module: "ModuleType", name: str, around: "Callable[..., Any]", everywhere: bool = True) -> bool:
    """Replace ``module.name`` by ``around(original, ...)``, and ``everywhere`` that nnU-Net has imported it by name."""
    import functools

    original = vars(module).get(name)
    if original is None:
        return False
    if getattr(original, "umit_wrapped", False):
        return True

    @functools.wraps(original)
    def wrapper(*args: "Any", **kwargs: "Any") -> "Any":
        return around(original, *args, **kwargs)

    wrapper.umit_wrapped = True  # type: ignore[attr-defined]
    setattr(module, name, wrapper)
    for other in list(sys.modules.values()) if everywhere else ():
        held = getattr(other, "__dict__", {})  # not getattr(other, name): that would wake lazy modules
        belongs = str(held.get("__name__")).split(".")[0] in ("nnunetv2", "__main__", "__mp_main__")
        if belongs and held.get(name) is original:
            setattr(other, name, wrapper)
    return True


def _lookup(
    original: "Callable[..., Any]",
    folder: str,
    class_name: str,
    current_module: "str | None" = None,
    *args: "Any",
    **kwargs: "Any",
) -> "Any":
    """nnU-Net's look-up with :data:`REGISTRY` in front; the package searched must match as well as the name.

    Raises:
        RuntimeError: no such UMIT name, neither ours nor among the modules that nnU-Net searches.
    """
    is_ours = isinstance(class_name, str) and class_name.startswith("UMIT") and current_module in _ROOMS
    if is_ours and (current_module, class_name) in REGISTRY:
        found = _import_class(REGISTRY[current_module, class_name], class_name)  # type: ignore[index]
        _use_fork_server()
        return found
    found = original(folder, class_name, current_module, *args, **kwargs)
    if found is None and is_ours:
        sentence = _unknown(class_name, str(current_module))
        if current_module != TRAINERS or not os.environ.get("nnUNet_extTrainer"):
            raise RuntimeError(sentence)
        print(f"nnunet-umit: {sentence} Trying nnUNet_extTrainer.", file=sys.stderr)
    return found


def _unknown(class_name: str, package: str) -> str:
    import difflib

    room, option = _ROOMS[package]
    known = [name for where, name in REGISTRY if where == package]
    close = difflib.get_close_matches(class_name, known, n=1)
    sentence = f"There is no {room} named {class_name}; known UMIT {room}s: {', '.join(known)}."
    for where, name in REGISTRY:
        if name == class_name:
            return f"{sentence} {name} is a {_ROOMS[where][0]} ({_ROOMS[where][1]})."
    return f"{sentence} Did you mean {option} {close[0]}?" if close else sentence


def _import_class(module_name: str, class_name: str) -> "Any":
    """Import the class without nnU-Net's own folder on ``sys.path``.

    nnU-Net puts it there while it searches; a first ``import imageio`` would then get ``nnunetv2/imageio``, for good.
    """
    import importlib

    nnunet = sys.modules.get("nnunetv2")
    own_folders = [os.path.abspath(folder) for folder in getattr(nnunet, "__path__", [])]
    hidden = [entry for entry in sys.path if entry and os.path.abspath(entry) in own_folders]
    for entry in hidden:
        sys.path.remove(entry)
    try:
        return getattr(importlib.import_module(module_name), class_name)
    finally:
        sys.path[:0] = hidden


def _find_for_prediction(original: "Callable[..., Any]", trainer_name: str, *args: "Any", **kwargs: "Any") -> "Any":
    """Classes of :data:`PREDICTION`; any other trainer is looked up as nnU-Net does it."""
    if trainer_name in PREDICTION:
        found = _import_class(*PREDICTION[trainer_name])
        _use_fork_server()
        return found
    return original(trainer_name, *args, **kwargs)


def _use_fork_server() -> None:
    """Workers of this command start from a process that has imported nnU-Net already."""
    from nnunet_umit.workers import use_fork_server

    use_fork_server()


def _load_pretrained(
    original: "Callable[..., Any]", network: "Any", fname: "str | os.PathLike[str]", *args: "Any", **kwargs: "Any"
) -> "Any":
    """Hand networks with ``load_umit_pretrained(path)`` to their own transfer; all others get the stock function."""
    load = getattr(_unwrapped(network), "load_umit_pretrained", None)
    if callable(load):
        return load(os.fspath(fname))
    return original(network, fname, *args, **kwargs)


def _get_trainer(
    original: "Callable[..., Any]",
    dataset_name_or_id: str,
    configuration: str,
    fold: "int | str",
    trainer_name: str = "nnUNetTrainer",
    plans_identifier: str = "nnUNetPlans",
    *args: "Any",
    **kwargs: "Any",
) -> "Any":
    """For UMIT trainers, missing datasets and plans are named with the command that makes them."""
    told = f"{plans_identifier} are UMIT plans, and {trainer_name} reads nothing of their umit block: "
    if (TRAINERS, trainer_name) in REGISTRY:
        from nnunet_umit.trainers.requirements import require_plans

        require_plans(dataset_name_or_id, plans_identifier)
    else:
        from nnunet_umit.plans.comparison import is_native

        if is_native(plans_identifier, dataset_name_or_id, configuration):  # before a trainer makes its folder
            raise RuntimeError(f"{told}it cannot train {configuration}, where every image has its own spacing; use -tr "
                               "UMITTrainer")  # fmt: skip
    trainer = original(dataset_name_or_id, configuration, fold, trainer_name, plans_identifier, *args, **kwargs)
    planned = getattr(getattr(trainer, "configuration_manager", None), "configuration", {})
    if "umit" in planned and (TRAINERS, trainer_name) not in REGISTRY:
        print(f"nnunet-umit: {told}schedule and optimiser are its own. Did you mean -tr UMITTrainer?", file=sys.stderr)
    return trainer


def _filter_models(
    original: "Callable[..., Any]", model_dict: "Sequence[dict[str, str]]", dataset: "int | str", *args: "Any"
) -> "Any":
    """``-p UMITPlans nnUNetPlans -tr UMITTrainer nnUNetTrainer`` means every plans with every trainer to nnU-Net.

    A UMIT trainer never trained another planner's plans, and a stock trainer rarely ours: such pairs are left out
    where they do not exist, and nnU-Net compares the rest. Without a UMIT trainer nothing changes.
    """
    if any(model["trainer"].startswith("UMIT") for model in model_dict):
        from nnunet_umit.plans.comparison import trained_pairs

        model_dict = trained_pairs(model_dict, dataset)
    return original(model_dict, dataset, *args)


def _unwrapped(network: "Any") -> "Any":
    """The network inside torch's data-parallel and compile wrappers, in either order."""
    from torch._dynamo import OptimizedModule
    from torch.nn.parallel import DistributedDataParallel

    while True:
        if isinstance(network, DistributedDataParallel):
            network = network.module
        elif isinstance(network, OptimizedModule):
            network = network._orig_mod
        else:
            return network
