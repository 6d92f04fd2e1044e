"""What is installed is what is here, whole, and works from anywhere without network."""
import ast
import configparser
import importlib.metadata
import json
import math
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import dreamllm_edu
from dreamllm_edu.documents.document import Document, Dream
from dreamllm_edu.documents.pictures import picture_tensor

from conftest import ROOT

PACKAGE = ROOT / "dreamllm_edu"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "_modidx.py")
DIRECT = {
    "torch",
    "transformers",
    "diffusers",
    "datasets",
    "accelerate",
    "einops",
    "fastcore",
    "fsspec",
    "huggingface_hub",
    "jinja2",
    "matplotlib",
    "numpy",
    "pillow",
    "pyarrow",
    "pyyaml",
    "safetensors",
    "tokenizers",
    "tqdm",
    "tyro",
}
SETTINGS = configparser.ConfigParser(delimiters=["="])
SETTINGS.read(ROOT / "settings.ini", encoding="utf8")
SETTINGS = SETTINGS["DEFAULT"]


def imports(path):
    """Every module that a file imports, at any depth, with its level of relativity resolved."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, ["dreamllm_edu" if node.level else "", node.module or ""]))
            found |= {base} if node.module else {f"{base}.{alias.name}" for alias in node.names}
            if base == "dreamllm_edu":
                found |= {f"dreamllm_edu.{alias.name}" for alias in node.names}
    return found


# ---------------------------------------------------------------- the source

def test_every_module_says_what_it_holds():
    for path in MODULES:
        assert path.name == "__init__.py" or ast.get_docstring(ast.parse(path.read_text(encoding="utf8"))), (
            f"{path} has no docstring"
        )


def test_only_declared_libraries_and_no_network():
    python = sys.stdlib_module_names
    project = {
        "PIL": "pillow",
        "yaml": "pyyaml",
        "markupsafe": "jinja2",
    }  # what is imported -> the project that brings it
    optional = {"deepspeed", "tensorboard"}  # extras, and a clear error without them (test_train)
    for path in MODULES:
        names = {name.split(".")[0] for name in imports(path)}
        for name in names - {"dreamllm_edu"} - optional:
            assert name in python or project.get(name, name) in DIRECT, f"{path} imports {name}, which is not declared"
        reaching = {"torchvision", "requests", "urllib", "http", "socket", "ftplib", "httpx"}
        found = {name for name in imports(path) if name.split(".")[0] in reaching}
        assert found <= {"urllib.parse"}, path  # which only takes addresses apart


def test_what_is_optional_is_an_extra_and_imported_only_when_asked_for():
    assert (
        SETTINGS["deepspeed_requirements"].startswith("deepspeed>=")
        and "deepspeed" in SETTINGS["dev_requirements"].split()
    )
    for path in MODULES:
        top = ast.parse(path.read_text(encoding="utf8")).body
        assert not [
            node for node in top if isinstance(node, (ast.Import, ast.ImportFrom)) and "deepspeed" in ast.dump(node)
        ], path


def public_things(sources):
    """(module, name, node) of every public module, class, function and method, also of those that `@patch` adds.
    `sources`: {module: its text}."""
    for path, source in sources.items():
        tree = ast.parse(source)
        yield path, "", tree
        for node in tree.body:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
                continue
            patched = any(ast.unparse(decorator).startswith("patch") for decorator in node.decorator_list)
            yield path, f"{ast.unparse(node.args.args[0].annotation)}.{node.name}" if patched else node.name, node
            for inner in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                    yield path, f"{node.name}.{inner.name}", inner


def documentation(things):
    """{class: {method: docstrings}}: its own one, and those of the same method of its bases. A class with all methods
    of a `Protocol` of the package implements it, and so inherits its documentation."""
    own, bases = {}, {}
    for _, name, node in things:
        if isinstance(node, ast.ClassDef):
            own.setdefault(name, {}).update(dict.fromkeys(re.findall(r"\bself\.(\w+)", ast.unparse(node)), ""))
            bases[name] = [ast.unparse(base).split("[")[0] for base in node.bases]
        elif "." in name:
            cls, method = name.split(".")
            own.setdefault(cls, {})[method] = ast.get_docstring(node) or ""
    protocols = {name for name in own if "Protocol" in bases.get(name, ())}
    found = {}
    for name, methods in own.items():
        implemented = {key for key in protocols if set(own[key]) <= set(methods)}
        ancestors = [own[key] for key in {name, *bases.get(name, ()), *implemented} if key in own]
        found[name] = {method: "\n".join(a.get(method, "") for a in ancestors).strip() for method in methods}
    return found


def undocumented(things):
    """What lacks a docstring, and which functions take a tensor without a word on its shape: `[B, T]`, `[]` or "any
    shape"."""
    things = list(things)
    found = documentation(things)
    for path, name, node in things:
        cls, _, method = name.rpartition(".")
        text = found[cls][method] if cls else ast.get_docstring(node)
        if not text:
            yield f"{path}: {name or 'the module'} has no docstring"
        elif isinstance(node, ast.FunctionDef):
            given = [a for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs) if a.annotation]
            tensors = [a.arg for a in given if re.search(r"\btorch\.Tensor\b", ast.unparse(a.annotation))]
            if tensors and not re.search(r"\[[^\]]*\]|any\s+shape", text):
                yield f"{path}: {name}: the docstring gives no shape of {', '.join(tensors)}"


def test_public_things_have_docstrings():
    sources = {path: path.read_text(encoding="utf8") for path in MODULES if not re.match(r"_[a-z]", path.name)}
    things = list(public_things(sources))
    kinds = [type(node).__name__ + "." * name.count(".") for _, name, node in things]
    assert min(map(kinds.count, ("Module", "ClassDef", "FunctionDef", "FunctionDef."))) > 40, "all kinds are looked at"
    assert not list(undocumented(things))


@pytest.mark.parametrize("source, lacking", [
    ("x = 1", "the module has no docstring"),
    ('"""M."""\ndef f(): pass', "f has no docstring"),
    ('"""M."""\ndef _f(): pass', None),
    ('"""M."""\nclass A:\n    "A."\n    def f(self): pass', "A.f has no docstring"),
    ('"""M."""\nclass A:\n    "A."\n    @property\n    def f(self): pass', "A.f has no docstring"),
    ('"""M."""\nclass A:\n    "A."\n    def f(self): "F."\nclass B(A):\n    "B."\n    def f(self): pass', None),
    ('"""M."""\nclass P(Protocol):\n    "P."\n    def f(self): "F."\nclass B:\n    "B."\n    def f(self): pass', None),
    ('"""M."""\nclass A: "A."\n@patch\ndef f(self: A): pass', "A.f has no docstring"),
    ('"""M."""\nclass A: "A."\n@patch(cls_method=True)\ndef f(cls: A): pass', "A.f has no docstring"),
    ('"""M."""\ndef f(x: torch.Tensor): "F."', "f: the docstring gives no shape of x"),
    ('"""M."""\ndef f(x: torch.Tensor | None): "F of x [B, T]."', None),
])
def test_what_counts_as_documented(source, lacking):
    found = list(undocumented(public_things({"m.py": source})))
    assert found == ([f"m.py: {lacking}"] if lacking else [])


# ---------------------------------------------------------------- the declarations

def test_settings():
    requirements = {re.match(r"[\w-]+", item)[0].lower() for item in SETTINGS["requirements"].split()}
    assert requirements == DIRECT
    assert (
        SETTINGS["version"] == dreamllm_edu.__version__
        and SETTINGS["min_python"] == "3.11"
        and SETTINGS["license"] == "apache2"
    )
    dev = SETTINGS["dev_requirements"].split()
    assert "nbdev==2.4.14" in dev and {"jupyterlab", "pytest"} <= set(dev) and not DIRECT & set(dev)


def test_the_environment_satisfies_the_declarations():
    from packaging.requirements import Requirement
    for item in SETTINGS["requirements"].split():
        need = Requirement(item)
        assert need.specifier.contains(importlib.metadata.version(need.name), prereleases=True), item


def test_the_command_is_installed():
    command = Path(sys.executable).with_name("dreamllm-edu")
    assert command.exists(), "install the package first: pip install -e ."
    run = subprocess.run([command, "--help"], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 and "generate" in run.stdout
    (entry,) = [e for e in importlib.metadata.entry_points(group="console_scripts") if e.name == "dreamllm-edu"]
    from dreamllm_edu.app.cli import main
    assert entry.load().__qualname__ == main.__qualname__


def test_constraints_name_every_direct_dependency():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].strip().lower() for line in lines if "==" in line and not line.startswith("#")}
    assert DIRECT <= pinned and any(re.match(r"torch==2\.13\.0", line) for line in lines)


def test_the_lowest_versions_are_those_that_are_tested():
    """Every lower bound of settings.ini is the version that `make test-lowest` installs, cut at the end at most."""
    lines = (ROOT / "constraints-lowest.txt").read_text(encoding="utf8").splitlines()
    tried = dict(line.split("==") for line in lines if "==" in line)
    bounds = {
        re.match(r"[\w-]+", item)[0]: re.search(r">=([\d.]+)", item)[1] for item in SETTINGS["requirements"].split()
    }
    assert set(tried) == set(bounds) == DIRECT
    for name, bound in bounds.items():
        assert tried[name].startswith(bound) and not tried[name][len(bound) :].strip(".0"), (
            f"{name}: {bound} declared, {tried[name]} tried"
        )


def test_licence_is_apache():
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf8")


# ---------------------------------------------------------------- the wheel

@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that nothing is left in the checkout; without network."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("settings.ini", "setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("dreamllm_edu", "data", "recipes"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(
        [sys.executable, "setup.py", "-q", "bdist_wheel", "-d", "dist"],
        cwd=folder,
        check=True,
        capture_output=True,
        timeout=200,
    )
    (path,) = (folder / "dist").glob("*.whl")
    return path


def test_the_wheel_is_whole(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(n for n in names if n.endswith("METADATA"))).decode()
        entries = archive.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    need = {
        f"dreamllm_edu/{path.relative_to(PACKAGE)}"
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    need |= {
        f"dreamllm_edu/_data/{path.relative_to(ROOT / 'data')}"
        for path in (ROOT / "data").rglob("*")
        if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts
    }
    need |= {f"dreamllm_edu/_recipes/{scale}.yaml" for scale in ("mini", "small", "paper")}
    assert need <= names, sorted(need - names)[:5]
    assert not [
        n for n in names if n.endswith((".ipynb", ".pyc", ".bin", ".pt")) or n.startswith(("tests/", "nbs/", ".runs"))
    ]
    wants = {
        re.match(r"Requires-Dist: ([\w-]+)", line)[1].lower()
        for line in metadata.splitlines()
        if line.startswith("Requires-Dist") and "extra ==" not in line
    }
    assert (
        wants == DIRECT and "Provides-Extra: dev" in metadata and "dreamllm-edu = dreamllm_edu.app.cli:main" in entries
    )
    assert "[nbdev]\ndreamllm_edu = dreamllm_edu._modidx:d" in entries, "the docs link names to pages and source"


def test_the_wheel_works_from_anywhere(wheel, tmp_path):
    """Unpacked elsewhere, without the checkout: data and templates are found inside the package, and a picture and a
    page's table come out of them."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import dreamllm_edu, pathlib; from dreamllm_edu.data import World, read_definitions, load; w = World(); "
        "assert pathlib.Path(dreamllm_edu.__file__).is_relative_to(r'%s') and w.folder.name == '_data', "
        "(dreamllm_edu.__file__, w.folder); "
        "assert w.picture('noto/' + w.by_name['cat']['key']).size == (64, 64) and len(read_definitions()) > 117000; "
        "from dreamllm_edu.training.recipe import recipe_of; assert recipe_of('mini').stages; "
        "from dreamllm_edu.app.page import cell; "
        "assert '<img' in cell(w.picture('noto/' + w.by_name['cat']['key']), 'cat'); print('fine')"
    ) % (tmp_path / "site")
    (tmp_path / "elsewhere").mkdir()
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "elsewhere",
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site"), "HF_HUB_OFFLINE": "1"},
    )
    assert run.stdout.strip() == "fine", run.stderr[-2000:]


# ---------------------------------------------------------------- the shipped weights

WEIGHTS = PACKAGE / "weights" / "mini"
PARTS = ("tokenizer", "language", "clip", "vae", "unet", "scheduler", "dreamllm", "judge")


def test_shipped_weights_are_whole_small_and_half():
    assert {path.name for path in WEIGHTS.iterdir()} >= set(PARTS)
    files = [path for path in (PACKAGE / "weights").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt", ".jsonl", ".md"}, "no pickles"
    for path in WEIGHTS.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                tensor = file.get_tensor(name)
                assert torch.isfinite(tensor.float()).all(), f"{path.parent.name}: {name} is not finite"
                assert tensor.dtype in (torch.float16, torch.int64), f"{path.parent.name}: {name} is {tensor.dtype}"


def test_shipped_weights_take_at_most_48_mb():
    size = sum(path.stat().st_size for path in (PACKAGE / "weights").rglob("*") if path.is_file())
    assert size <= 48e6, f"{size / 1e6:.1f} MB of weights"


@pytest.fixture(scope="module")
def shipped():
    from dreamllm_edu.models.dreamllm.model import DreamLLM
    from dreamllm_edu.models.dreamllm.weights import mini_processor
    return DreamLLM.from_pretrained("mini"), mini_processor()


def test_the_shipped_parts_fit_together(shipped):
    model, processor = shipped
    assert len(processor.tokenizer) == model.config.text_config.vocab_size
    assert (processor.num_queries, processor.num_patches) == (model.config.num_queries, model.config.num_patches)
    assert (processor.layout.id["<dream_start>"], processor.layout.id["<image_start>"]) == (
        model.config.dream_start_id,
        model.config.image_start_id,
    )
    assert processor.max_length <= model.config.text_config.max_position_embeddings
    assert all(not p.requires_grad for part in model.frozen_parts for p in getattr(model, part).parameters())


def test_the_shipped_model_answers_as_metrics_json_says(shipped, world):
    """Every figure of comprehension again, on fewer questions: the intervals overlap."""
    from dreamllm_edu.evaluation.suite import measure_comprehension

    published = json.loads((WEIGHTS / "metrics.json").read_text())["comprehension"]
    again = measure_comprehension(*shipped, world, n=24)
    for name in ("caption_top1", "vqa"):
        for key, value in again[name].items():
            old = published[name][key]
            assert value["n"] == 24 and value["low"] <= old["high"] and old["low"] <= value["high"], (key, value, old)


def test_the_shipped_judge_scores_as_metrics_json_says(world):
    """On all real drawings that it did not learn from; nothing is random about it."""
    from dreamllm_edu.evaluation.judge import judge_data, load_judge

    published = json.loads((WEIGHTS / "metrics.json").read_text())["comprehension"]["ceiling_judge"]
    pictures, concepts, styles, held = judge_data(world)
    with torch.no_grad():
        logits = [load_judge(WEIGHTS / "judge")(x.float() / 127.5 - 1) for x in pictures[held].split(64)]
    for head, (key, truth) in enumerate((("concept_top1", concepts), ("style_top1", styles))):
        right = (torch.cat([pair[head] for pair in logits]).argmax(-1) == truth[held]).double().mean().item()
        assert published[key]["n"] == held.sum() and right == pytest.approx(published[key]["value"], abs=0.01), key


def test_metrics_json_keeps_what_the_results_page_claims_in_words():
    """Computes nothing: metrics.json against nbs/results.ipynb, whose prose says that pictures are placed and arranged
    well, seen pictures are named, unseen ones seldom, though their style is told; drawings follow the words."""
    metrics = json.loads((WEIGHTS / "metrics.json").read_text())
    creation = metrics["creation"]
    for split in ("seen", "held_out_renderings"):
        assert creation[split]["concept_top1"]["low"] > creation["baseline_shuffled"][split]["concept_top1"]["high"], (
            split
        )
        assert creation[split]["style_top1"]["low"] > 1 / 4, split
    seen, text, ceiling = creation["seen"], creation["baseline_text_encoder"]["seen"], creation["ceiling_vae"]["seen"]
    for key, least in (("concept_top1", 0.85), ("style_top1", 0.85)):
        assert (
            seen[key]["low"] > least
            and text[key]["low"] < seen[key]["value"] < text[key]["high"]
            and seen[key]["value"] <= ceiling[key]["value"]
        ), key
    assert creation["held_out_concepts"]["style_top1"]["low"] > 1 / 4
    unseen, told = creation["held_out_renderings"], creation["baseline_text_encoder"]["held_out_renderings"]
    assert (
        unseen["style_top1"]["low"] > told["style_top1"]["value"]
        and unseen["concept_top1"]["low"] < told["concept_top1"]["value"]
    )
    assert (
        0.35 < unseen["concept_top1"]["value"] < 0.45 and unseen["concept_top1"]["high"] < told["concept_top1"]["value"]
    )
    assert 0.7 < metrics["editing"]["style_top1"]["value"] < 0.8
    edits = metrics["editing"]
    for split, thing, style in (
        ("seen", 0.8, 0.8),
        ("held_out_renderings", 0.36, 0.66),
    ):  # in words: four in five, one in three, two in three
        assert (
            abs(edits[split]["concept_top1"]["value"] - thing) < 0.05
            and abs(edits[split]["style_top1"]["value"] - style) < 0.05
        ), split
    assert (
        edits["baseline_source"]["concept_top1"]["low"] > 0.9 and edits["baseline_source"]["style_top1"]["value"] == 0
    )
    assert metrics["language"]["ratio"]["high"] < 1.05
    assert (
        metrics["scenes"]["relation"]["low"] > 0.8
        and metrics["layout"]["precision"] == metrics["layout"]["recall"] == 1
    )
    assert metrics["layout"]["interval"]["f1"]["low"] > 0.7, (
        "thirteen classes, all right: one class in four might still go wrong"
    )
    written = metrics["articles"]
    assert (
        min(written[key]["illustrated"]["value"] for key in ("seen", "held_out")) > 0.98
        and written["seen"]["belongs"]["low"] > 0.9
    )
    assert min(written[key]["illustrated"]["low"] for key in ("seen", "held_out")) > 0.85
    assert written["held_out"]["belongs"]["value"] < 0.1 and 0.6 < written["held_out"]["distinct"]["value"] < 0.7
    reading = metrics["comprehension"]
    assert (
        reading["baseline_nearest"]["caption_top1"]["value"] < 0.08
        and 0.4 < reading["ceiling_judge"]["concept_top1"]["value"] < 0.6
    )
    named = reading["caption_top1"]["held_out_renderings"]
    assert 0.05 < named["value"] < 0.08 and named["low"] < reading["baseline_nearest"]["caption_top1"]["value"]
    assert (
        metrics["comprehension"]["vqa"]["style"]["low"] > 0.5
        and metrics["comprehension"]["caption_top1"]["held_out_renderings"]["high"] < 0.2
    )
    assert (
        metrics["comprehension"]["caption_top1"]["seen"]["low"] > 0.85
        and metrics["comprehension"]["vqa"]["count"]["low"] > 0.95
    )


def hours_of(command):
    """What the usage page says of a command: "about 4½ hours"."""
    hours = re.search(rf"{command} .*about (\d+)(½?) hours", page("usage"))
    return int(hours[1]) + 0.5 * bool(hours[2])


def test_training_json_records_the_steps_of_the_recipe_and_the_hours_of_the_usage_page():
    from dreamllm_edu.training.recipe import recipe_of
    learned = json.loads((WEIGHTS / "training.json").read_text())
    assert {name: made["steps"] for name, made in learned.items()} == {
        stage.name: stage.steps for stage in recipe_of("mini").stages
    }
    assert abs(sum(made["seconds"] for made in learned.values()) / 3600 - hours_of("train --scale mini")) < 0.25


def test_pretraining_again_json_records_the_default_steps_and_the_hours_of_the_usage_page():
    import inspect

    from dreamllm_edu import pretraining

    jobs = {
        "clip": (pretraining.pretrain_clip, "steps", "vision_steps"),
        "vae": (pretraining.pretrain_vae, "steps"),
        "language": (pretraining.pretrain_language, "steps"),
        "judge": (pretraining.train_judge, "steps"),
        "unet": (pretraining.pretrain_unet, "steps"),
        "decoder": (pretraining.pretrain_decoder, "steps", "perceptor_steps"),
    }
    made = json.loads((WEIGHTS / "pretraining_again.json").read_text())
    assert {part: m["steps"] for part, m in made.items()} == {
        part: sum(inspect.signature(job).parameters[name].default for name in names)
        for part, (job, *names) in jobs.items()
    }
    assert abs(sum(m["seconds"] for m in made.values()) / 3600 - hours_of("pretrain all")) < 0.25


def test_parts_again_json_differs_from_parts_json_only_where_the_results_page_says():
    """Computes nothing: two data files against the page's claim."""
    shipped, again = (json.loads((WEIGHTS / name).read_text()) for name in ("parts.json", "parts_again.json"))

    def alike(part, key):
        """Within the error of their difference: half its interval is the root of the summed squares of the two
        halves."""
        a, b = shipped[part][key], again[part][key]
        return abs(a["value"] - b["value"]) <= math.hypot(a["high"] - a["low"], b["high"] - b["low"]) / 2

    asked = [
        ("language", "perplexity"),
        ("clip", "retrieval_at_1"),
        ("clip", "style_at_1"),
        ("vae", "psnr"),
        ("judge", "concept_top1"),
        ("unet", "concept_top1"),
        ("unet", "style_top1"),
    ]
    assert [which for which in asked if not alike(*which)] == [("clip", "retrieval_at_1"), ("clip", "style_at_1")], (
        "results page: all parts but CLIP"
    )
    assert (
        again["clip"]["retrieval_at_1"]["value"] > shipped["clip"]["retrieval_at_1"]["value"]
        and again["clip"]["style_at_1"]["value"] < shipped["clip"]["style_at_1"]["value"]
    )
    assert again["unet"]["concept_top1"]["low"] > 0.85 and again["unet"]["exchanged"]["concept_top1"]["high"] < 0.05


def test_the_shipped_model_draws_what_it_was_asked_rather_than_the_opposite(shipped, world):
    """A wide margin, not a benchmark: drawings of seen wishes are nearer to their own real drawing than to the
    others'."""
    model, processor = shipped
    wishes = [
        ("red apple", "noto"),
        ("sunflower", "twemoji"),
        ("penguin", "fluent"),
        ("pizza", "noto"),
        ("rocket", "twemoji"),
        ("frog", "fluent"),
    ]
    documents = model.generate(
        [Document([f"{name} in {style.capitalize()} style:", Dream()]) for name, style in wishes],
        processor,
        max_new_tokens=0,
        num_inference_steps=10,
    )
    drawn = torch.stack([picture_tensor(d.pictures[0], 16) for d in documents])
    real = torch.stack(
        [picture_tensor(world.picture(f"{style}/{world.by_name[name]['key']}"), 16) for name, style in wishes]
    )
    distance = (drawn[:, None] - real[None]).square().mean((2, 3, 4))
    assert (distance.argmin(1) == torch.arange(len(wishes))).sum() >= 4, np.round(distance.numpy(), 2)


def test_the_shipped_model_ends_its_answer_with_the_drawing(shipped, world):
    model, processor = shipped
    wishes = [
        "red apple in Noto style",
        "pizza in Twemoji style",
        "penguin in Fluent style",
        "rocket in OpenMoji style",
        "sunflower in Noto style",
        "frog in Twemoji style",
    ]
    documents = model.generate(
        [Document([f"User: show me {wish}.\nAssistant:"]) for wish in wishes],
        processor,
        max_new_tokens=48,
        max_pictures=2,
        num_inference_steps=2,
    )
    ends = [len(d.pictures) == 1 and not isinstance(d.parts[-1], str) for d in documents]
    assert sum(ends) >= 5, [d.parts for d in documents]


def judged_noto(world):
    from dreamllm_edu.evaluation.judge import judge_pictures, load_judge
    judge = load_judge(WEIGHTS / "judge")
    picked = range(0, 821, 12)
    concepts, styles = judge_pictures(judge, [world.picture(f"noto/{world.concepts[i]['key']}") for i in picked])
    right = np.mean([found == i for found, i in zip(concepts.argmax(-1).tolist(), picked)])
    return right, (styles.argmax(-1) == 1).float().mean()


def test_the_shipped_judge_knows_real_drawings(world):
    assert judged_noto(world)[0] > 0.6


def test_the_shipped_judge_knows_styles(world):
    assert judged_noto(world)[1] > 0.8


# ---------------------------------------------------------------- the README and the pages that it links

README = (ROOT / "README.md").read_text(encoding="utf8")
PAGES = ("usage", "results", "limits", "robustness", "course", "many_gpus", "official_model")


def page(name):
    """A page as its reader sees it: its text, its visible code, and the tables that its cells wrote."""
    parts = []
    for cell in json.loads((ROOT / "nbs" / f"{name}.ipynb").read_text(encoding="utf8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif "#| echo: false" not in source:
            parts.append(f"```python\n{source}\n```")
        parts += [
            "".join(output["data"].get("text/markdown", "")) for output in cell.get("outputs", []) if "data" in output
        ]
    return "\n\n".join(parts)


def as_text(value):
    if not isinstance(value, dict):
        return f"{value:.3g}" if isinstance(value, float) else str(value)
    return f"{value['value']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"


def flat(metrics, prefix=""):
    for key, value in metrics.items():
        yield from (
            flat(value, f"{prefix}{key}.")
            if isinstance(value, dict) and "value" not in value
            else [(f"{prefix}{key}", value)]
        )


def test_readme_is_what_the_index_notebook_says():
    run = subprocess.run(
        [sys.executable, ROOT / "tests" / "make_readme.py", "--check"], capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stderr


def test_readme_is_one_screen_and_links_every_page():
    assert len(README.splitlines()) <= 60
    assert {f"nbs/{name}.ipynb" for name in PAGES} <= set(re.findall(r"\]\((nbs/[^)]+)\)", README))
    for target in re.findall(r"\]\((nbs/[^)]+)\)", README) + re.findall(r'(?:src|srcset)="([^"]+)"', README):
        assert (ROOT / target).is_file(), target


def test_the_five_figures_of_the_readme_are_those_of_metrics_json():
    metrics = dict(flat(json.loads((WEIGHTS / "metrics.json").read_text())))
    own = [
        "creation.seen.concept_top1",
        "creation.held_out_renderings.concept_top1",
        "comprehension.caption_top1.held_out_renderings",
        "scenes.both_concepts",
        "language.ratio",
    ]
    other = [
        "creation.baseline_shuffled.seen.concept_top1",
        "creation.baseline_shuffled.held_out_renderings.concept_top1",
        "comprehension.baseline_nearest.caption_top1",
        "scenes.ceiling_real.both_concepts",
    ]
    rows = [
        line.split("|")
        for line in README.splitlines()
        if line.startswith("| ") and "[" in line and "the miniature ..." not in line
    ]
    assert [row[2].replace("*", "").strip() for row in rows] == [as_text(metrics[key]) for key in own]
    assert [row[3].strip()[:17] for row in rows[:4]] == [as_text(metrics[key]) for key in other]
    minutes = sum(value for key, value in metrics.items() if key.startswith("seconds.")) / 60
    assert f"in {minutes:.0f} minutes on two cores" in README


def test_the_results_page_quotes_every_figure_of_the_shipped_files():
    text = page("results")
    metrics = json.loads((WEIGHTS / "metrics.json").read_text())
    for name, value in flat({key: value for key, value in metrics.items() if key not in ("creation", "seconds")}):
        assert f"| `{name}` | {as_text(value)}" in text, name
    for name, value in flat(metrics["creation"]):
        assert as_text(value) in text, name
    for name in ("parts.json", "parts_again.json"):
        for key, value in flat(json.loads((WEIGHTS / name).read_text())):
            if (
                isinstance(value, dict)
                and not key.endswith("top5")
                and key not in ("vae.mean_picture", "judge.style_top1")
                and (name, "exchanged" in key) != ("parts_again.json", True)
            ):
                assert as_text(value) in text, f"{name}: {key}"
    for name, stage in json.loads((WEIGHTS / "training.json").read_text()).items():
        assert f"| {name} | {stage['steps']:,} | {stage['seconds'] / 60:.0f} |" in text


def test_the_limits_page_quotes_metrics_json():
    metrics, text = dict(flat(json.loads((WEIGHTS / "metrics.json").read_text()))), page("limits")
    for key in (
        "creation.held_out_concepts.concept_top1",
        "creation.held_out_renderings.concept_top1",
        "comprehension.caption_top1.held_out_renderings",
        "articles.held_out.belongs",
        "articles.held_out.distinct",
        "editing.held_out_renderings.concept_top1",
    ):
        assert as_text(metrics[key]) in text, key


def test_the_hours_of_the_course():
    """As on the first page: 100 words a minute, and the minutes that the exercises state."""
    cells = [
        cell
        for path in sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
        for cell in json.loads(path.read_text(encoding="utf8"))["cells"]
    ]
    prose = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    reading = sum(len(text.split()) for text in prose) / 100 / 60
    exercises = (
        sum(int(minutes) for text in prose for minutes in re.findall(r"^\*\*Exercise.* (\d+) minutes", text, re.M)) / 60
    )
    total, read, exercised = map(
        int, re.search(r"\*\*(\d+) hours\*\*: (\d+) of reading and (\d+) of exercises", README).groups()
    )
    assert abs(read - reading) < 1 and abs(exercised - exercises) < 1 and abs(total - reading - exercises) < 1, (
        reading,
        exercises,
    )
    assert README.count(f"{len(list((ROOT / 'nbs').glob('[0-9]*.ipynb')))} notebooks, about") == 1


def test_tables_and_pictures_are_well_formed():
    """Every row of a Markdown table has as many cells as its head; raw HTML closes what it opens; pictures have a text
    for those who do not see them."""
    for name, text in [("README", README), *((name, page(name)) for name in PAGES)]:
        for block in re.findall(r"(?:^\|.*\n?)+", text, re.M):
            assert len({line.count("|") for line in block.splitlines()}) == 1, f"{name}: {block[:200]}"
        for tag in ("table", "tr", "td", "th", "picture"):
            assert len(re.findall(f"<{tag}[ >]", text)) == text.count(f"</{tag}>"), f"{name}: <{tag}>"
        assert all('alt="' in image for image in re.findall(r"<img [^>]*>", text)), name


def test_the_diagram_is_what_its_program_draws():
    import xml.etree.ElementTree as ElementTree

    run = subprocess.run(
        [sys.executable, ROOT / "tools" / "diagrams.py", "--check"], capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stdout
    for name in ("light", "dark"):
        root = ElementTree.parse(ROOT / "nbs" / "images" / f"system-{name}.svg").getroot()
        names = [element.tag.split("}")[1] for element in root.iter()]
        assert (
            names.count("title") == names.count("desc") == 1 and names.count("text") > 20 and root.get("role") == "img"
        )
        ink = " ".join("".join(element.itertext()) for element in root.iter() if element.tag.endswith("}text"))
        for word in (
            "document",
            "CLIP",
            "visual",
            "dream queries",
            "language",
            "condition",
            "U-Net",
            "VAE",
            "picture loss",
            "word loss",
            "frozen",
            "read again",
        ):
            assert word in ink, f"{name}: {word}"


def test_the_python_of_the_readme_runs_as_it_stands(tmp_path):
    """Pasted line by line into one file, in an empty folder, followed by that of the usage page. Blocks that need the
    published checkpoint on disk are left out."""
    code = "\n".join(
        block
        for block in re.findall(r"^```python\n(.*?)^```", README + page("usage"), re.M | re.S)
        if "dreamllm-7b" not in block
    )
    assert code.count("model.generate(") == 3 and README.count("model.generate(") == 1
    (tmp_path / "pasted.py").write_text(
        code.replace("fox = World()", "print(fox.size)\nfox = World()") + "\nprint(owl.pictures[0].size)\n",
        encoding="utf8",
    )
    run = subprocess.run(
        [sys.executable, "pasted.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert run.returncode == 0 and run.stdout.count("(64, 64)") == 2, run.stderr[-2000:]


def test_the_prompt_of_the_usage_page_is_drawn(tmp_path):
    lines = [
        line.strip()
        for line in page("usage").splitlines()
        if line.startswith("    printf ") or line.startswith("    dreamllm-edu generate ")
    ]
    assert len(lines) == 2
    run = subprocess.run(
        ["sh", "-ec", "\n".join(lines)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )
    assert run.returncode == 0 and (tmp_path / "answer.html").read_text(encoding="utf8").count("<img") == 2, run.stderr[
        -2000:
    ]


def test_solutions_are_folded():
    for path in sorted((ROOT / "nbs").glob("*.ipynb")):
        cells = [
            c
            for c in json.loads(path.read_text(encoding="utf8"))["cells"]
            if c["cell_type"] == "code" and 'code-summary: "Solution"' in "".join(c["source"])
        ]
        assert all(c["metadata"].get("jupyter", {}).get("source_hidden") for c in cells), path.name
        appendix = re.match(r"A\d_", path.stem)  # no lesson: it may do without exercises
        assert path.stem in ("index", *PAGES) or appendix or len(cells) >= 2, (
            f"{path.name}: {len(cells)} exercises with a solution"
        )


def test_public_functions_have_types():
    """Every parameter and result of a public function or method at the top of a module or class says its type."""
    for path in MODULES:
        tree = ast.parse(path.read_text(encoding="utf8"))
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
        for node in [*tree.body, *(inner for cls in classes for inner in cls.body)]:
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                continue
            given = [
                a
                for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
                if a.arg not in ("self", "cls")
            ]
            bare = [a.arg for a in given if a.annotation is None]
            assert not bare and node.returns is not None, (
                f"{path.relative_to(PACKAGE)}: {node.name} lacks types of {bare or 'its result'}"
            )
