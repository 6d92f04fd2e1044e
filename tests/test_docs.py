"""The site: what nbdev makes of the notebooks, without Quarto. Every page is whole, and every link ends somewhere."""
import ast
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest
import yaml

from conftest import ROOT

NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
IMPORTS = (ast.Import, ast.ImportFrom)
REPOSITORY = re.compile(r"https://github\.com/dreamllm-edu/dreamllm_edu/blob/main/([^#]+)(?:#L(\d+))?$")


def cells(path):
    """(kind, source, outputs as Markdown or HTML) of every cell."""
    for cell in json.loads(Path(path).read_text(encoding="utf8"))["cells"]:
        shown = [(kind, "".join(output["data"][kind])) for output in cell.get("outputs", [])
                 for kind in ("text/markdown", "text/html") if kind in output.get("data", {})]
        yield cell["cell_type"], "".join(cell["source"]), shown


def without_code(text):
    """Markdown without fenced and indented blocks, and with inline code and maths blanked."""
    text = re.sub(r"^(```+|~~~+).*?^\1\s*$", "", text, flags=re.M | re.S)
    text = re.sub(r"(?:\A|(?<=\n\n))(?: {4}.*(?:\n|\Z)|\n)+", "\n", text)
    text = re.sub(r"(`+)(?!`)(?:(?!\n\n).)+?(?<!`)\1(?!`)", "CODE", text, flags=re.S)
    return re.sub(r"\$\$.+?\$\$|\$[^$\n]+\$", "MATHS", text, flags=re.S)


# ---------------------------------------------------------------- the notebooks


def mixed_imports(source):
    """The first statement that shares a cell with an import, or None. nbdev executes every cell that holds an import,
    without the cells before it; it executes exported cells in any case, and those may import inside functions."""
    body = ast.parse(source).body
    if re.search(r"^#\|\s*export", source, re.M):
        found = any(isinstance(node, IMPORTS) for node in body)
    else:
        found = any(isinstance(node, IMPORTS) for top in body for node in ast.walk(top))
    for node in body if found else ():
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        types_only = isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        if not isinstance(node, IMPORTS) and not docstring and not types_only:
            return ast.unparse(node).splitlines()[0]
    return None


@pytest.mark.parametrize("source, found", [
    ("import os\nx = 1", "x = 1"),
    ("def f():\n    import os", "def f():"),
    ("#| export\ndef f():\n    import os", None),
    ("#| export\nimport os\nx = 1", "x = 1"),
    ('#| export a.b\n"""Docstring."""\nimport os\nfrom a import b', None),
    ("x = 1", None),
])
def test_what_counts_as_a_mixed_cell(source, found):
    assert mixed_imports(source) == found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_cell_with_imports_holds_nothing_else(path):
    for number, (kind, source, _) in enumerate(cells(path)):
        found = kind == "code" and mixed_imports(source)
        assert not found, f"{path.name}, cell {number}: `{found}` shares a cell with imports; give it one of its own"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_first_cell_is_the_front_matter_and_the_only_heading_of_level_one(path):
    (kind, first, _), *others = cells(path)
    assert kind == "markdown" and re.fullmatch(r"# [^\n]+\n\n> [^\n]+", first), (
        f"{path.name}: the first cell is '# title', an empty line, '> one line of description', and nothing else"
    )
    for number, (kind, source, shown) in enumerate(others, 1):
        texts = [text for kind_, text in shown if kind_ == "text/markdown"] + [source] * (kind == "markdown")
        for text in texts:
            heading = re.search(r"^# .+", without_code(text), re.M)
            assert not heading, f"{path.name}, cell {number}: {heading[0]!r} is a second title; sections begin with ##"


class Open(HTMLParser):
    """Which elements of a piece of HTML are not closed, or closed without having been opened."""
    VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}

    def __init__(self, text):
        super().__init__()
        self.stack, self.wrong = [], []
        self.feed(text)
        self.close()
        self.wrong += [f"<{tag}> is not closed" for tag in self.stack]

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.stack.append(tag)
        if tag == "img" and "alt" not in dict(attributes):
            self.wrong.append("<img> without alt")

    def handle_endtag(self, tag):
        if tag in self.VOID:
            return
        if not self.stack or self.stack.pop() != tag:
            self.wrong.append(f"</{tag}> closes nothing, or something else")


@pytest.mark.parametrize("text, right", [
    ("<table><tr><td>a</td></tr></table>", True), ("<table><tr><td>a<td>b</tr></table>", False), ("<td>a</tr>", False),
    ('<picture><source srcset="a"><img src="b" alt=""></picture>', True), ("<img src='a'>", False),
    ("<svg><path d=''/></svg>", True),
])
def test_what_counts_as_closed(text, right):
    assert (not Open(text).wrong) == right


@pytest.mark.parametrize("path", [*NOTEBOOKS, ROOT / "README.md"], ids=lambda path: path.stem)
def test_html_closes_what_it_opens(path):
    """A cell that stays open swallows the rest of the page."""
    if path.suffix == ".md":
        texts = [(0, "text/markdown", path.read_text(encoding="utf8"))]
    else:
        texts = [(number, kind_, text) for number, (kind, source, shown) in enumerate(cells(path))
                 for kind_, text in [*shown, *[("text/markdown", source)] * (kind == "markdown")]]
    for number, kind, text in texts:
        wrong = Open(without_code(text) if kind == "text/markdown" else text).wrong
        assert not wrong, f"{path.name}, cell {number}: {wrong}"


# ---------------------------------------------------------------- the site


def file_name(path):
    """The page that nbdev makes of a notebook: lower case, without the number in front."""
    return re.sub(r"^\d+[a-zA-Z0-9]*_", "", path.stem.lower()) + ".html"


def test_no_two_notebooks_make_the_same_page():
    assert len({file_name(path) for path in NOTEBOOKS}) == len(NOTEBOOKS)


def test_the_sidebar_lists_every_notebook_once():
    def flat(contents):
        for item in contents:
            yield from [item] if isinstance(item, str) else flat(item["contents"])

    site = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf8"))
    listed = list(flat(site["website"]["sidebar"]["contents"]))
    assert sorted(listed) == sorted(f"nbs/{path.name}" for path in NOTEBOOKS)
    assert listed[0] == site["project"]["render"][0] == "nbs/index.ipynb" and site["execute"] == {"enabled": False}
    for pattern in site["project"]["resources"]:
        assert list(ROOT.glob(pattern)), pattern


def state():
    """What git sees of the working tree."""
    run = subprocess.run(["git", "status", "--porcelain", "--ignored"], cwd=ROOT, capture_output=True, text=True)
    return {line for line in run.stdout.splitlines() if "__pycache__" not in line and "_cache" not in line}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The processed notebooks: {page: (its notebook, text, anchors)}."""
    folder, before = tmp_path_factory.mktemp("docs") / "_proc", state()
    run = subprocess.run([sys.executable, ROOT / "tools" / "docs.py", "--process", folder], capture_output=True,
                         text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    assert state() == before, "something was left behind in the working tree"
    return folder


def slug(heading):
    """Pandoc's identifier of a heading (auto_identifiers): text in lower case, spaces as hyphens, most signs dropped,
    nothing before the first letter."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    text = re.sub(r"[^\w\s.-]", "", text).strip().lower()
    return re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", text)) or "section"


def page(path):
    """The text of a processed notebook and the anchors that its headings and `id`s make."""
    texts = []
    for kind, source, shown in cells(path):
        texts += [source] if kind == "markdown" else [text for _, text in shown]
    text = "\n\n".join(texts)
    anchors = set(re.findall(r"""\bid=["']([^"']+)""", text)) | set(re.findall(r"\{#([\w.-]+)", text))
    headings = re.findall(r"^#+ (.+?)\s*#*$", re.sub(r"^(```+).*?^\1\s*$", "", text, flags=re.M | re.S), re.M)
    for name in map(slug, headings):
        number = 0
        while f"{name}-{number}" * bool(number) in anchors or (not number and name in anchors):
            number += 1
        anchors.add(f"{name}-{number}" if number else name)
    return text, anchors


def links(text):
    """The targets of Markdown links and images, and of `href`, `src` and `srcset`."""
    text = without_code(text.replace("[`", "[").replace("`]", "]"))
    yield from re.findall(r"\]\(<?([^)\s>]+)>?[^)]*\)", text)
    yield from re.findall(r"^\[[^\]]+\]:\s*(\S+)", text, re.M)
    yield from (target for found in re.findall(r"""\b(?:href|src|srcset)=["']([^"']+)["']""", text)
                for target in found.split(", "))


def broken(target, pages, folder):
    """Why a link of a page in `folder` ends nowhere, or None."""
    in_repository = REPOSITORY.match(target)
    if in_repository:
        file, line = ROOT / in_repository[1], int(in_repository[2] or 1)
        return None if file.is_file() and line <= len(file.read_text(encoding="utf8").splitlines()) else "no such line"
    if re.match(r"(https?|mailto|data):", target):
        return None
    name, _, anchor = unquote(target).partition("#")
    key = file_name(Path(name)) if name.endswith(".ipynb") else name
    if name.endswith(".ipynb") and not (folder / name).is_file() or name.endswith(".html") and key not in pages:
        return "no such page"
    if key and key not in pages and not (folder / key).is_file():
        return "no such file"
    return None if not anchor or key not in pages or anchor in pages[key][1] else "no such section"


def test_every_link_of_the_site_ends_somewhere(site):
    folder = site / "nbs"
    pages = {file_name(path): page(path) for path in folder.glob("*.ipynb")}
    assert len(pages) == len(NOTEBOOKS)
    wrong, count = [], 0
    for name, (text, anchors) in pages.items():
        own = {**pages, "": (text, anchors)}
        for target in links(text):
            count += 1
            why = broken(target, own, folder)
            wrong += [f"{name}: {target}: {why}"] if why else []
    assert not wrong, "\n".join(wrong)
    assert count > 500
    for target, why in {"model.html#dreamllm": None, "model.html#nowhere": "no such section", "x.png": "no such file",
                        "x.ipynb": "no such page", "#nowhere": "no such section", "08_model.ipynb#sizes": None}.items():
        assert broken(target, {**pages, "": ("", set())}, folder) == why, f"the checker itself: {target}"


def test_pages_link_to_the_source_and_names_to_their_pages(site):
    text, _ = page(site / "nbs" / "08_model.ipynb")
    assert re.search(r"^\[source\]\(https://github\.com/[^)]+/dreamllm/model\.py#L\d+\)", text, re.M)
    assert "[`unet_config`](diffusion.html#unet_config)" in text and "dreamllm-edu.github.io" not in text
    for path in NOTEBOOKS:
        front = "".join(json.loads((site / "nbs" / path.name).read_text(encoding="utf8"))["cells"][0]["source"])
        assert f"output-file: {file_name(path)}\n" in front and "title: " in front and "description: " in front, path


def test_the_processed_folder_holds_pages_and_pictures_only(site):
    files = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
    pictures = {path.relative_to(ROOT).as_posix() for path in (ROOT / "nbs" / "images").rglob("*") if path.is_file()}
    assert files == {"_quarto.yml", *(f"nbs/{path.name}" for path in NOTEBOOKS), *pictures}


@pytest.fixture
def copy(tmp_path):
    """A repository with what the site needs, without notebooks; and a caller of its tools/docs.py, without Quarto."""
    folder = tmp_path / "copy"
    for name in ("nbs/images", "tools"):
        shutil.copytree(ROOT / name, folder / name)
    for name in ("settings.ini", "_quarto.yml", "README.md"):
        shutil.copy(ROOT / name, folder)
    environment = {"PATH": "/nowhere", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    return folder, lambda *options: subprocess.run([sys.executable, "tools/docs.py", *options], cwd=folder, timeout=120,
                                                   capture_output=True, text=True, env=environment)


def test_without_quarto_the_command_says_what_to_install(copy):
    folder, docs = copy
    shutil.copy(ROOT / "nbs" / "limits.ipynb", folder / "nbs")
    run = docs()
    assert run.returncode == 1 and "pip install quarto-cli" in run.stderr and "quarto.org" in run.stderr, run.stderr
    assert (folder / "_proc" / "nbs" / "limits.ipynb").is_file() and not (folder / "_docs").exists()
    assert (folder / "README.md").read_bytes() == (ROOT / "README.md").read_bytes()
    assert {path.name for path in folder.iterdir()} == {
        "nbs", "tools", "settings.ini", "_quarto.yml", "README.md", "_proc"}


def test_a_cell_that_fails_is_named(copy):
    """A mixed cell, as nbdev meets it."""
    folder, docs = copy
    sources = ["#| export\ndef f():\n    'A function.'", "value = 1", "import os\nprint(value)"]
    notebook = nbformat.v4.new_notebook(cells=[
        nbformat.v4.new_markdown_cell("# Broken\n\n> On purpose."), *map(nbformat.v4.new_code_cell, sources)])
    nbformat.write(notebook, folder / "nbs" / "broken.ipynb")
    run = docs("--process", "out")
    assert run.returncode == 1 and "Error in notebook: Broken" in run.stderr and "print(value)" in run.stderr
    assert not (folder / "out").exists()
