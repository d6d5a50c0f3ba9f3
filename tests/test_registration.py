"""Stock nnU-Net finds UMIT names: at start-up, late; and nobody else notices (in workers: test_workers.py).

What concerns the state of an interpreter runs in a fresh one. Those use stub modules in place of the package's real
classes, so that these tests are about registration alone; the last test looks up the real ones.
"""

import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import nnunet_umit
from nnunet_umit import registration

PACKAGE_PARENT = Path(nnunet_umit.__file__).parent.parent

STUBS = """
import sys, types
from nnunet_umit import registration
class UMITTrainer: pass
class UMITPlanner: pass
for name, cls in (("nnunet_umit.trainers.finetune", UMITTrainer), ("nnunet_umit.plans.planner", UMITPlanner)):
    sys.modules[name] = types.ModuleType(name)
    setattr(sys.modules[name], cls.__name__, cls)
"""
FOLDER = "/no/such/folder"  # an empty walk: whatever is found did not come from it


def run_python(
    code: str, *flags: str, folder: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter with the start-up hook switched off, unless the environment given says not."""
    settings = {name: value for name, value in os.environ.items() if name not in (registration.NO_HOOK, "PYTHONPATH")}
    settings = {**settings, registration.NO_HOOK: "1", **environment}
    return subprocess.run(
        [sys.executable, *flags, "-c", textwrap.dedent(code)],
        capture_output=True,
        encoding="utf-8",
        env={name: value for name, value in settings.items() if value},
        cwd=folder,
        timeout=120,
        check=False,
    )


def output_of(code: str, *flags: str, folder: Path | None = None, **environment: str) -> str:
    done = run_python(code, *flags, folder=folder, **environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.strip()


# --- start-up -----------------------------------------------------------------------------------------------------


def test_start_up_imports_nothing_but_the_hook() -> None:
    """What keeps the start of every Python program of the environment quick."""
    code = f"""
    import os, sys
    sys.path.insert(0, {str(PACKAGE_PARENT)!r})
    before = set(sys.modules)
    import nnunet_umit.registration as r; r.install()
    print(r.mechanism(), *sorted(set(sys.modules) - before), sep=";")
    """
    mechanism, *modules = output_of(code, "-S", NNUNET_UMIT_NO_HOOK="").split(";")
    assert mechanism == registration.START_UP
    assert modules == ["nnunet_umit", "nnunet_umit.registration"]


def test_installed_package_registers_at_start_up_and_obeys_the_opt_out() -> None:
    code = "import sys; print([getattr(f, 'umit_mechanism', None) for f in sys.meta_path][0])"
    assert output_of(code, NNUNET_UMIT_NO_HOOK="") == registration.START_UP
    assert output_of(code, NNUNET_UMIT_NO_HOOK="0") == registration.START_UP
    assert output_of(code, NNUNET_UMIT_NO_HOOK="1") == "None"
    assert output_of(code, "-I", NNUNET_UMIT_NO_HOOK="") == registration.START_UP


def test_start_up_files_are_one_guarded_line_each_and_silent_without_the_package(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[1]
    line = (root / "nnunet_umit.pth").read_text()
    assert line.count("\n") == 1 and line.startswith("import ")
    done = subprocess.run(
        [sys.executable, "-S", "-c", line], capture_output=True, encoding="utf-8", cwd=tmp_path, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    module, function = (root / "nnunet_umit.start").read_text().strip().split(":")
    assert module == registration.__name__
    assert getattr(registration, function) is registration.install


def test_install_and_register_are_idempotent_and_the_package_offers_register() -> None:
    code = """
    import sys, nnunet_umit
    from nnunet_umit import registration
    print(registration.is_active(), end=" ")
    nnunet_umit.register(); nnunet_umit.register(); registration._add_finder("again")
    print(registration.mechanism(), sum(hasattr(f, "umit_mechanism") for f in sys.meta_path))
    """
    assert output_of(code) == "False register() 1"


# --- look-up ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("name", ["recursive_find_python_class", "_recursive_find_python_class"])
def test_names_are_found_in_their_package_only(late: bool, name: str) -> None:
    code = f"""
    {"from nnunetv2.utilities.find_class_by_name import " + name + " as early" if late else ""}
    import nnunetv2.utilities.find_class_by_name as module
    registration.register()
    {"" if late else "import importlib; importlib.reload(module)"}
    finds = [module.{name}{", early" if late and name[0] != "_" else ""}]
    for find in finds:
        assert find({FOLDER!r}, "UMITTrainer", registration.TRAINERS) is UMITTrainer
        assert find({FOLDER!r}, "UMITPlanner", registration.PLANNERS) is UMITPlanner
        assert find(folder={FOLDER!r}, class_name="UMITPlanner", current_module=registration.PLANNERS) is UMITPlanner
        assert find({FOLDER!r}, "nnUNetTrainer", registration.TRAINERS) is None
        assert find({FOLDER!r}, "UMITTrainer", "nnunetv2.imageio") is None
        assert find({FOLDER!r}, "UMITTrainer", None) is None
    print("fine")
    """
    assert output_of(STUBS + textwrap.dedent(code)) == "fine"


def test_early_importers_of_the_look_up_are_patched_too() -> None:
    code = """
    from nnunetv2.utilities import label_handling  # anything light
    import nnunetv2.utilities.find_class_by_name as module
    user = types.ModuleType("nnunetv2.user"); sys.modules["nnunetv2.user"] = user
    stranger = types.ModuleType("stranger"); sys.modules["stranger"] = stranger
    for other in (user, stranger):
        other.recursive_find_python_class = module.recursive_find_python_class
    registration.register()
    print(user.recursive_find_python_class is module.recursive_find_python_class,
          stranger.recursive_find_python_class is module.recursive_find_python_class)
    """
    assert output_of(STUBS + textwrap.dedent(code)) == "True False"


def test_hook_survives_probes_and_leaves_the_real_loader_behind() -> None:
    code = f"""
    import importlib.util
    registration._add_finder("test")
    for _ in range(2):
        spec = importlib.util.find_spec("nnunetv2.utilities.find_class_by_name")
        assert spec.origin.endswith("find_class_by_name.py"), spec
        assert spec.loader.get_filename() == spec.origin
    import nnunetv2.utilities.find_class_by_name as module
    assert module.recursive_find_python_class({FOLDER!r}, "UMITTrainer", registration.TRAINERS) is UMITTrainer
    import importlib.machinery, inspect
    assert type(module.__loader__) is type(module.__spec__.loader) is importlib.machinery.SourceFileLoader
    assert "def recursive_find_python_class" in inspect.getsource(module)
    importlib.reload(module)
    assert module.recursive_find_python_class({FOLDER!r}, "UMITTrainer", registration.TRAINERS) is UMITTrainer
    print("fine")
    """
    assert output_of(STUBS + textwrap.dedent(code)) == "fine"


def test_a_look_up_does_not_walk_through_nnunets_modules() -> None:
    code = """
    import nnunetv2, os
    registration.register()
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class as find
    base = nnunetv2.__path__[0]
    before = set(sys.modules)
    folder = os.path.join(base, "training", "nnUNetTrainer")
    assert find(folder, "UMITTrainer", registration.TRAINERS, base) is UMITTrainer
    assert find(os.path.join(base, "experiment_planning"), "UMITPlanner", registration.PLANNERS) is UMITPlanner
    print(sorted(name for name in set(sys.modules) - before if name.split(".")[0] in ("nnunetv2", "torch")))
    """
    assert output_of(STUBS + textwrap.dedent(code)) == "[]"


def test_classes_are_imported_without_nnunets_folder_on_the_path(tmp_path: Path) -> None:
    (tmp_path / "probe_module.py").write_text("import sys\nclass UMITProbe:\n    seen = list(sys.path)\n")
    code = f"""
    import nnunetv2, os
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class as early
    registration.register()
    registration.REGISTRY[registration.TRAINERS, "UMITProbe"] = "probe_module"
    sys.path.append({str(tmp_path)!r})
    base = nnunetv2.__path__[0]
    sys.path.insert(0, base)  # as nnU-Net does while it searches
    found = early({FOLDER!r}, "UMITProbe", registration.TRAINERS, base)
    print(base in found.seen, sys.path[0] == base)
    """
    assert output_of(STUBS + textwrap.dedent(code)) == "False True"


@pytest.mark.parametrize(
    ("room", "name", "expected"),
    [
        ("TRAINERS", "UMITTrainr", ["UMITTrainr", "UMITTrainer, UMITPretrainTrainer", "Did you mean -tr UMITTrainer?"]),
        ("PLANNERS", "UMITPlannerXL", ["UMITPlannerXL", "UMITPlanner, UMITPlannerS", "Did you mean -pl UMITPlanner"]),
        ("PLANNERS", "UMITTrainer", ["no planner named UMITTrainer", "UMITTrainer is a trainer (-tr)"]),
        ("PREPROCESSORS", "UMITNothing", ["no preprocessor named UMITNothing", "UMITPreprocessor"]),
    ],
)
def test_unknown_umit_names_are_refused_with_the_known_ones(room: str, name: str, expected: list[str]) -> None:
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

    registration.register()
    with pytest.raises(RuntimeError) as error:
        recursive_find_python_class(FOLDER, name, getattr(registration, room))
    for part in expected:
        assert part in str(error.value)


def test_unknown_trainers_may_live_in_the_users_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``UMITMine`` in nnUNet_extTrainer is a user's subclass; nnU-Net's own search must get to it."""
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class as find

    registration.register()
    (tmp_path / "mine.py").write_text("class UMITMine: pass\n")
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path))
    assert find(FOLDER, "UMITMine", registration.TRAINERS) is None
    assert find(str(tmp_path), "UMITMine", None, base_folder=str(tmp_path)).__name__ == "UMITMine"
    assert find(str(tmp_path), "UMITMine", registration.TRAINERS, base_folder=str(tmp_path)) is None


def test_a_class_that_fails_to_import_says_so_itself() -> None:
    code = f"""
    registration.register()
    registration.REGISTRY[registration.TRAINERS, "UMITBroken"] = "nnunet_umit.no_such_module"
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class as find
    try:
        find({FOLDER!r}, "UMITBroken", registration.TRAINERS)
    except ModuleNotFoundError as error:
        print(error.name)
    """
    assert output_of(STUBS + textwrap.dedent(code)) == "nnunet_umit.no_such_module"


def test_a_failing_patch_is_one_line_and_the_import_goes_on() -> None:
    code = """
    def broken(module): raise ValueError("two\\nlines")
    registration._PATCHES["nnunetv2.utilities.find_class_by_name"] = broken
    registration.register()
    import nnunetv2.utilities.find_class_by_name as module
    print(callable(module.recursive_find_python_class))
    """
    done = run_python(STUBS + textwrap.dedent(code))
    assert done.stdout.strip() == "True"
    assert done.stderr.count("\n") == 1
    assert "find_class_by_name failed (ValueError: two lines)" in done.stderr


def test_install_never_raises() -> None:
    code = """
    def broken(origin): raise OSError("no")
    registration._add_finder = broken
    import os; del os.environ[registration.NO_HOOK]
    registration.install()
    """
    done = run_python(STUBS + textwrap.dedent(code))
    assert done.returncode == 0
    assert done.stderr.count("\n") == 1


def test_another_hook_that_asks_all_finders_does_not_recurse() -> None:
    """A finder written like ours asks us while we ask it; one of the two has to step back."""
    code = f"""
    class Nosy:
        def find_spec(self, name, path=None, target=None):
            if not name.startswith("nnunetv2.utilities.find"): return None
            answers = (f.find_spec(name, path, target) for f in sys.meta_path if f is not self)
            return next((spec for spec in answers if spec is not None), None)
    registration.register()
    sys.meta_path.insert(1, Nosy())
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class as find
    print(find({FOLDER!r}, "UMITTrainer", registration.TRAINERS).__name__)
    """
    assert output_of(STUBS + textwrap.dedent(code)) == "UMITTrainer"


# --- -pretrained_weights in a fresh interpreter -------------------------------------------------------------------


def test_late_registration_reaches_run_training_too() -> None:
    code = """
    from nnunetv2.run import run_training, load_pretrained_weights as module
    from nnunet_umit import registration
    stock = module.load_pretrained_weights
    registration.register()
    assert module.load_pretrained_weights is not stock
    assert module.load_pretrained_weights.__wrapped__ is stock
    print(run_training.load_pretrained_weights is module.load_pretrained_weights)
    """
    assert output_of(code, "-W", "ignore") == "True"


def test_start_up_registration_reaches_run_training() -> None:
    code = """
    from nnunetv2.run import run_training
    print(run_training.load_pretrained_weights.umit_wrapped)
    """
    assert output_of(code, "-W", "ignore", NNUNET_UMIT_NO_HOOK="") == "True"


def test_prediction_gets_the_network_and_imports_no_training() -> None:
    """In a fresh interpreter, where nothing has imported nnU-Net's trainer yet."""
    code = """
    import inspect, sys
    from nnunetv2.inference import predict_from_raw_data as module
    from nnunetv2.utilities import find_objects
    found = module.recursive_find_trainer_class_by_name("UMITTrainer")
    assert "plans_manager" in inspect.signature(found.build_network_architecture).parameters
    unwanted = ("nnunet_umit.trainers", "nnunetv2.training.nnUNetTrainer")
    print([name for name in sys.modules if name.startswith(unwanted)])
    real = find_objects.recursive_find_trainer_class_by_name("UMITTrainer")
    assert issubclass(real, found) and real.__name__ == "UMITTrainer"
    assert real.build_network_architecture is found.build_network_architecture
    print(module.recursive_find_trainer_class_by_name("nnUNetTrainer").__name__)
    """
    assert output_of(code, "-W", "ignore", NNUNET_UMIT_NO_HOOK="").splitlines() == ["[]", "nnUNetTrainer"]


# --- the shim for nnUNet_extTrainer -------------------------------------------------------------------------------


def test_shim_gives_trainers_without_the_hook_and_keeps_their_identity() -> None:
    code = """
    import os
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class as find
    folder = os.environ["nnUNet_extTrainer"]
    options = dict(base_folder=folder, cleanup_imports_from_base_folder=True)
    first, second = (find(folder, "UMITTrainer", None, **options) for _ in range(2))
    assert first is second is UMITTrainer
    assert find(folder, "UMITPlanner", None, **options) is None
    assert "umit_trainers" not in sys.modules
    print(registration.mechanism())
    """
    shim = PACKAGE_PARENT / "nnunet_umit" / "ext"
    assert output_of(STUBS + textwrap.dedent(code), nnUNet_extTrainer=str(shim)) == "register()"


# --- the real classes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("package", "name"), list(registration.REGISTRY))
def test_every_registered_name_is_a_class_that_pickles(package: str, name: str) -> None:
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

    registration.register()
    found = recursive_find_python_class(FOLDER, name, package)
    assert isinstance(found, type) and found.__name__ == name
    assert found.__module__ == registration.REGISTRY[package, name]
    assert pickle.loads(pickle.dumps(found)) is found


def test_planners_do_not_import_trainers() -> None:
    code = """
    import sys
    from nnunet_umit import registration
    registration.register()
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class as find
    find("/no/such/folder", "UMITPlanner", registration.PLANNERS)
    unwanted = ("nnunet_umit.trainers", "nnunetv2.training.nnUNetTrainer")
    print([name for name in sys.modules if name.startswith(unwanted)])
    """
    assert output_of(code, "-W", "ignore") == "[]"


@pytest.mark.end_to_end
def test_stock_command_names_the_known_trainers(nnunet_env: object) -> None:
    command = Path(sys.executable).parent / "nnUNetv2_train"
    done = subprocess.run(
        [str(command), "1", "3d_fullres", "0", "-tr", "UMITNoSuchTrainer", "-device", "cpu"],
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    assert "There is no trainer named UMITNoSuchTrainer; known UMIT trainers: UMITTrainer" in done.stderr
