"""The site: nbdev processes the notebooks into `_proc/`, then Quarto makes pages of them in `_docs/`.

    python tools/docs.py                # both halves; without Quarto only the first one, and exit code 1
    python tools/docs.py --process DIR  # only the first half, into the folder DIR

nbdev works in a temporary copy that holds the notebooks and their pictures and nothing else. Called in the repository
itself, `nbdev_docs` also rewrites README.md, leaves `nbdev.yml` behind, copies weights and data into `_proc/`, and
tries to install Quarto."""
import argparse
import inspect
import os
import shutil
import subprocess
import sys
import tempfile
from configparser import ConfigParser
from pathlib import Path
from types import FunctionType

from nbdev.showdoc import BasicMarkdownRenderer

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = ConfigParser(delimiters=["="])
SETTINGS.read(ROOT / "settings.ini", encoding="utf8")
SITE = SETTINGS["DEFAULT"]["doc_host"] + SETTINGS["DEFAULT"]["doc_baseurl"]
NO_QUARTO = """\
_proc/ holds the processed notebooks. Quarto makes pages of them, and it is not installed. Install it
    from https://quarto.org/docs/get-started/  (version 1.4 or later; tried with 1.7)
    or with `pip install quarto-cli`           (downloads it)
and run `make docs` again."""
HOME = '<!doctype html><meta charset="utf-8"><title>{0}</title><meta http-equiv="refresh" content="0; url={1}">' \
       '<a href="{1}">{0}</a>\n'
PROCESS = "from nbdev.serve import proc_nbs; proc_nbs(n_workers={})"


class Renderer(BasicMarkdownRenderer):
    """What the page shows of a symbol: as nbdev does it, but a decorated method keeps its full name (nbdev: that of the
    function inside, so links to it end nowhere), and a class shows its public methods, each under a heading of its
    own."""

    def __init__(self, sym, name=None, title_level=3):
        own = getattr(sym, "__qualname__", None)
        super().__init__(sym, name=name or own, title_level=title_level)
        self.nm, self.fn = self.nm.replace("__", r"\_\_"), own or self.fn  # `__call__` is no bold word
        methods = vars(sym).items() if inspect.isclass(sym) else ()
        self.methods = [Renderer(getattr(sym, key), f"{own}.{key}", title_level + 1) for key, value in methods
                        if not key.startswith("_") and isinstance(value, (FunctionType, classmethod, staticmethod))]

    def _repr_markdown_(self):
        return "\n\n".join([super()._repr_markdown_(), *(method._repr_markdown_() for method in self.methods)])


def process(target: Path, workers: int = min(2, os.cpu_count() or 1)) -> None:
    """Write the processed notebooks to `target`, which is replaced: what `nbdev_proc_nbs` does. Raises
    `CalledProcessError`, whose `stderr` names notebook and cell, when a cell that nbdev executes fails."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        (copy / "nbs").mkdir(parents=True)
        for name in ("settings.ini", "_quarto.yml"):
            shutil.copy(ROOT / name, copy)
        with (copy / "settings.ini").open("a", encoding="utf8") as settings:
            settings.write("renderer = docs.Renderer\n")
        for path in (ROOT / "nbs").glob("*.ipynb"):
            shutil.copy(path, copy / "nbs")
        shutil.copytree(ROOT / "nbs" / "images", copy / "nbs" / "images")
        metadata = Path(folder) / "site-0.dist-info"  # as setup.py declares it, also where no installation knows it yet
        metadata.mkdir()
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: site\nVersion: 0\n")
        (metadata / "entry_points.txt").write_text("[nbdev]\ndreamllm_edu = dreamllm_edu._modidx:d\n")
        path = os.pathsep.join(filter(None, [folder, str(ROOT), str(ROOT / "tools"), os.environ.get("PYTHONPATH")]))
        subprocess.run([sys.executable, "-c", PROCESS.format(workers)], cwd=copy, check=True, capture_output=True,
                       text=True, env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"})
        for page in (copy / "_proc" / "nbs").glob("*.ipynb"):  # links that also work on a site that lies elsewhere
            page.write_text(page.read_text(encoding="utf8").replace(f"{SITE}/nbs/", ""), encoding="utf8")
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(copy / "_proc", target)


def render(processed: Path, target: Path) -> None:
    """Make pages of the processed notebooks with Quarto, in `target`, which is replaced."""
    subprocess.run(["quarto", "render", "--no-cache"], cwd=processed, check=True)
    shutil.rmtree(target, ignore_errors=True)
    shutil.move(processed / "_docs", target)
    (target / "index.html").write_text(HOME.format("dreamllm_edu", "nbs/index.html"), encoding="utf8")


def main() -> str | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--process", type=Path, metavar="DIR", help="only process the notebooks, into this folder")
    args = parser.parse_args()
    try:
        process(args.process or ROOT / "_proc")
    except subprocess.CalledProcessError as error:
        return error.stderr
    if args.process:
        return None
    if shutil.which("quarto") is None:
        return NO_QUARTO
    render(ROOT / "_proc", ROOT / "_docs")
    return None


if __name__ == "__main__":
    sys.exit(main())
