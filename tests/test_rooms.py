"""Imports run one way: a module imports only from rooms below its own, and families of models know nothing of each
other."""

import ast
from pathlib import Path

import pytest

from conftest import ROOT

PACKAGE = ROOT / "dreamllm_edu"
ORDER = (
    ("files",),
    ("documents",),
    ("data", "sequences"),
    ("parts",),
    ("models",),
    ("training",),
    ("evaluation",),
    ("pretraining",),
    ("planning",),
    ("app",),
)  # from the ground up; `pretraining` trains the judge and a perceptor of its class, `evaluation` never pretrains
TRAINING_NEEDS = ("files", "documents", "data", "sequences", "parts", "models.base", "training")
ENTRIES = {"__main__": "app", "train": "app"}  # `python -m dreamllm_edu`, `python -m dreamllm_edu.train`

# What still breaks the rule, as (module, module that it imports). Take out what has been mended: the test fails when
# this could be shorter.
PENDING: set[tuple[str, str]] = set()


def module_name(path: Path) -> str:
    """Dotted name below the package; a package's `__init__` is the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


# `_auto`, `_moved` and `_modidx` are no rooms, nor is the package's own `__init__` (named ""): they are the front door,
# and may name anything.
PATHS = {
    module_name(path): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if not module_name(path).startswith(("_auto", "_mo"))
}
MODULES = set(PATHS)


def imported_modules(name: str) -> set[str]:
    """The package's modules that a module imports, at any depth, relative imports resolved."""
    path, targets = PATHS[name], set()
    package = name.split(".") if path.name == "__init__.py" and name else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if isinstance(node, ast.Import):
            wholes = [(alias.name, ()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = ["dreamllm_edu", *package[:len(package) - node.level + 1]] if node.level else []
            wholes = [
                (".".join([*above, *([node.module] if node.module else [])]), [alias.name for alias in node.names])
            ]
        else:
            continue
        for whole, names in wholes:
            root, _, module = whole.partition(".")
            if root == "dreamllm_edu":
                below = {f"{module}.{one}".lstrip(".") for one in names} & MODULES  # `from package import module`
                targets |= below or {module}
    return targets


def room(name: str) -> str:
    return ENTRIES.get(name, name.split(".")[0])


def level(name: str) -> int:
    """Place of the room in `ORDER`; one that is not listed counts as above all others."""
    return next((i for i, rooms in enumerate(ORDER) if room(name) in rooms), len(ORDER))


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def family(name: str) -> str | None:
    """The family of models that a module belongs to; None for `models.base` and for all other rooms."""
    parts = name.split(".")
    return parts[1] if parts[0] == "models" and len(parts) > 1 and parts[1] != "base" else None


def allowed(name: str, target: str) -> bool:
    if target == "":  # the package's public face: only the application may go through the front door
        return room(name) == "app"
    if room(name) == "training":
        return any(within(target, prefix) for prefix in TRAINING_NEEDS)
    if room(name) == "models" and room(target) == "models":
        return target == "models" or family(target) in (None, family(name))
    if room(target) == "app":
        return room(name) == "app"
    return level(target) <= level(name)


def test_every_module_has_a_room():
    rooms = {room for rooms in ORDER for room in rooms}
    assert {room(name) for name in MODULES - {""}} == rooms


def test_imports_are_found():
    """The reader of imports itself: relative, absolute, inside functions, of modules and of names."""
    assert "parts.tokenizer" in imported_modules("pretraining") and "pretraining" in imported_modules("app.cli")
    assert "training.fit" in imported_modules("training.trainer") and "app.demo" in imported_modules("app.cli")
    assert {"models.dreamllm.config", "models.dreamllm.generation"} <= imported_modules("models.dreamllm")


@pytest.mark.parametrize(
    "name, target, expected",
    [
        ("evaluation.suite", "pretraining", False),
        ("pretraining", "evaluation.judge", True),
        ("planning", "app.cli", False),
        ("training.trainer", "models.base", True),
        ("training.trainer", "models.dreamllm.weights", False),
        ("training.trainer", "evaluation.judge", False),
        ("training.trainer", "planning", False),
        ("training.trainer", "pretraining", False),
        ("training.trainer", "documents.formats", True),
        ("training.trainer", "parts.loading", True),
        ("training.trainer", "files", True),
        ("training.batches", "sequences", True),
        ("training.batches", "models.dreamllm.layout", False),
        ("training.features", "models.base", True),
        ("training.features", "models.dreamllm.objective", False),
        ("training.recipe", "data.readers", True),
        ("training.recipe", "models", False),
        ("training.stage", "app.train", False),
        ("models.dreamllm.model", "models.illume.model", False),
        ("models.base", "models.dreamllm", False),
        ("models.illume.model", "models.base", True),
        ("data.tasks", "sequences", True),
        ("documents.document", "data.world", False),
        ("train", "app.train", True),
        ("parts.vision", "", False),
    ],
)
def test_the_rule_itself(name, target, expected):
    assert allowed(name, target) == expected


def test_imports_run_one_way():
    broken = {
        (name, target) for name in MODULES - {""} for target in imported_modules(name) if not allowed(name, target)
    }
    assert not broken - PENDING, f"these import from a room above their own: {sorted(broken - PENDING)}"
    assert not PENDING - broken, f"mended, take out of PENDING: {sorted(PENDING - broken)}"


def test_no_module_is_loaded_by_its_name_in_a_string():
    """But by the package itself, whose public names are loaded when they are first used, and by the registry of
    families, which finds each by its folder below `models`."""
    for name in MODULES - {"", "models"}:
        text = PATHS[name].read_text(encoding="utf8")
        assert "import_module(" not in text and "__import__(" not in text, name
    (line,) = [line for line in PATHS["models"].read_text(encoding="utf8").splitlines() if "import_module(" in line]
    assert 'f"{__name__}.{found.name}.family"' in line, "the registry loads families of its own folder alone"
