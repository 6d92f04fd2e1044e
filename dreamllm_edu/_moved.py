"""The module names of version 0.1.0 still work, with a `DeprecationWarning` that names the new place.

`import dreamllm_edu.model` gives a module that holds nothing. A name is looked up in the modules that the old one was
divided into, when it is used; nothing is imported before."""

import importlib
import importlib.machinery
import sys
import warnings
from types import CodeType, ModuleType
from collections.abc import Callable, Sequence

MOVED = {  # old module -> the modules that hold its names now; all below `dreamllm_edu`
    "cli": ["app.cli"],
    "corpora": ["data.readers", "data.records", "data.shards", "data.lanes"],
    "demo": ["app.demo", "app.page", "app.card", "evaluation.suite"],
    "diffusion": ["parts.diffusion"],
    "generation": ["models.dreamllm.generation"],
    "language": ["parts.language"],
    "losses": ["parts.denoising"],
    "model": ["models.dreamllm.model", "models.dreamllm.config", "models.dreamllm.weights", "parts.loading", "files"],
    "official": ["models.dreamllm.official", "files"],
    "planner": ["planning"],
    "queries": ["models.dreamllm.queries"],
    "tokenization": ["parts.tokenizer", "sequences", "models.dreamllm.layout", "models.dreamllm.processor"],
    "vision": ["parts.vision"],
}
DIVIDED = {  # these still exist, but some of their names lie elsewhere
    "data": ["files"],
    "documents": ["files"],
    "evaluation": ["evaluation.judge", "evaluation.metrics", "evaluation.suite", "evaluation.intervals", "pretraining"],
    "train": [
        "app.train",
        "training.trainer",
        "training.batches",
        "training.features",
        "training.strategies",
        "training.checkpoint",
        "training.ranks",
        "training.report",
        "training.recipe",
        "sequences",
        "models.dreamllm.layout",
        "models.dreamllm.objective",
        "files",
        "data.readers",
    ],
    "training": ["training.fit", "training.stage", "training.trainer", "models.dreamllm.layout"],
}
RENAMED = {
    "written_aside": "atomic_write",
    "write_file": "write_bytes",
    "let_others_read": "apply_umask",
    "checked_tensors": "read_tensors",
    "weights_sum": "weights_checksum",
    "parts_mark": "frozen_checksum",
    "check_parts": "check_frozen_parts",
    "measure_strangers": "measure_out_of_distribution",
    "to_unit": "to_unit_range",
    "everybodys": "all_gather",
    "wishes": "sample_prompts",
    "jiggle": "augment",
    "erase": "random_erase",
    "agree": "all_reduce",
    "pick": "sample_tokens",
    "tell": "stream_text",
}
PACKAGE = __name__.rpartition(".")[0]


def new_modules(places: list[str]) -> list[ModuleType]:
    """The modules, imported; those that have moved on are left out."""
    found = []
    for place in places:
        try:
            found.append(importlib.import_module(f"{PACKAGE}.{place}"))
        except ModuleNotFoundError as error:
            if not (error.name or "").startswith(f"{PACKAGE}."):  # a library that is not installed is another matter
                raise
    return found


def attribute_of(old: str, places: list[str]) -> Callable[[str], object]:
    """A module's `__getattr__`: looks a name up in the new modules and warns. `old`: the module's full name."""

    def __getattr__(name: str) -> object:
        missing = AttributeError(f"module {old!r} has no attribute {name!r}", name=name)
        if name == "__all__" and old.removeprefix(f"{PACKAGE}.") in MOVED:
            return sorted({name for module in new_modules(places) for name in getattr(module, "__all__", ())})
        if (
            name.startswith("__")
            or f"{old}.{name}" in sys.modules
            or f"{old}.{name}".removeprefix(f"{PACKAGE}.") in places
        ):
            raise missing  # a submodule, which the import system finds by itself
        for module in new_modules(places):
            for known in (name, RENAMED.get(name, name)):
                if hasattr(module, known):
                    value = getattr(module, known)
                    home = sys.modules.get(getattr(value, "__module__", None) or "", module)
                    home = home if home.__name__.startswith(f"{PACKAGE}.") and hasattr(home, known) else module
                    warnings.warn(f"{old}.{name} is now {home.__name__}.{known}", DeprecationWarning, stacklevel=2)
                    return value
        raise missing

    return __getattr__


def real_spec(
    own: object, name: str, path: Sequence[str] | None, target: ModuleType | None
) -> importlib.machinery.ModuleSpec | None:
    """What the other finders find. `own`: the finder that asks."""
    others = (
        finder.find_spec(name, path, target)
        for finder in sys.meta_path
        if finder is not own and hasattr(finder, "find_spec")
    )
    return next((spec for spec in others if spec is not None), None)


def run_after(loader: object, action: Callable[[ModuleType], None]) -> None:
    """Let a loader call `action(module)` when it has loaded a module; one that cannot be changed stays as it is."""
    load = getattr(loader, "exec_module", None)
    if load is None:
        return

    def exec_module(module: ModuleType) -> None:
        load(module)
        action(module)

    try:
        loader.exec_module = exec_module
    except AttributeError:
        pass


def forward(module: ModuleType) -> None:
    """Give a divided module a `__getattr__` for the names that left it, if it has none of its own."""
    if "__getattr__" not in vars(module):
        module.__getattr__ = attribute_of(module.__name__, DIVIDED[module.__name__.rpartition(".")[2]])


class Finder:
    """Finds the old module names where there is no such module any more, and forwards for those that were divided."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, last = name.rpartition(".")
        if package != PACKAGE or last not in MOVED and last not in DIVIDED:
            return None
        spec = real_spec(self, name, path, target)
        if spec is None and last in MOVED:
            return importlib.machinery.ModuleSpec(name, self, origin=f"moved, see {__name__}")
        if spec is not None and last in DIVIDED:
            run_after(spec.loader, forward)
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        """None: an ordinary module."""

    def exec_module(self, module: ModuleType) -> None:
        places = MOVED[module.__name__.rpartition(".")[2]]
        new = [f"{PACKAGE}.{place}" for place in places]
        module.__doc__ = f"Moved to {', '.join(new)}."
        module.__getattr__ = attribute_of(module.__name__, places)
        warnings.warn(f"{module.__name__} is now {', '.join(new)}", DeprecationWarning, stacklevel=2)

    def get_code(self, name: str) -> CodeType:
        """What `python -m dreamllm_edu.cli` runs."""
        places = MOVED[name.rpartition(".")[2]]
        if places != ["app.cli"]:
            raise ImportError(
                f"{name} is now {PACKAGE}.{places[0]} and is no command; the command is python -m {PACKAGE}"
            )
        return compile(f"import sys\nfrom {PACKAGE}.app.cli import main\nsys.exit(main())", f"<{name}>", "exec")


RUNNABLE = ("", ".__main__", ".cli", ".app.cli", ".train")  # what `python -m` may run, behind the package's name
COMMANDS = {  # beginning of another module's name -> the command that does its work
    ".app.demo": " demo",
    ".app.train": ".train",
    ".demo": " demo",
    ".evaluation": " evaluate",
    ".generation": " generate",
    ".models.dreamllm.generation": " generate",
    ".planner": " plan",
    ".planning": " plan",
    ".pretraining": " pretrain",
    ".training": ".train",
}


def check_command() -> None:
    """End the process with a message if it was started as `python -m` of a module that is no command: Python would
    run the module, do nothing, and report success."""
    argv, words = getattr(sys, "argv", []), getattr(sys, "orig_argv", [])
    if argv[:1] != ["-m"] or len(words) < len(argv):  # so it is only while Python looks for the module to run
        return
    name = words[-len(argv)]
    name = name.partition("m")[2] if name.startswith("-") else name  # also `-mdreamllm_edu.planning`
    inside = name.removeprefix(PACKAGE)
    if inside == name or inside[:1] not in ("", ".") or inside in RUNNABLE:
        return
    command = next((command for start, command in COMMANDS.items() if inside.startswith(start)), "")
    sys.exit(f"{name} is no command; the command is python -m {PACKAGE}{command}")


def install() -> None:
    """Put the finder on `sys.meta_path`; a second call does nothing."""
    if not any(type(finder).__module__ == __name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder())
