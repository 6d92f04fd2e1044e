"""Run every notebook from top to bottom, and check that the library and the stored notebooks are in step.

    python tests/check_notebooks.py            # run all, change nothing
    python tests/check_notebooks.py --keep     # also store the new outputs
    python tests/check_notebooks.py 02 07      # only these

Prints `N passed, N failed` and exits non-zero if anything failed."""
import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
LIMIT = 180  # seconds a notebook may take


def tidy(notebook):
    """Drop the printed lines that speak of this machine and not of the lesson: warnings with its paths, what DeepSpeed
    says of its accelerator."""
    foreign = ("[real_accelerator.py:", str(ROOT), str(Path.home()), sys.prefix)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "stream" and any(word in output.text for word in foreign):
                lines = output.text.splitlines(keepends=True)
                output.text = (
                    ""
                    if output.name == "stderr"
                    else "".join(line for line in lines if not any(word in line for word in foreign))
                )
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.output_type != "stream" or o.text.strip()]


def run(path, keep):
    """Execute one notebook in its own folder; (path, seconds, error or None)."""
    notebook, began, error = nbformat.read(path, as_version=4), time.time(), None
    client = NotebookClient(
        notebook,
        timeout=2 * LIMIT,
        startup_timeout=180,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
    )
    try:
        client.execute()
    except Exception as problem:  # a failing cell, a dead kernel or a time-out: all are failures of this notebook
        error = str(problem)[-3000:]
    seconds = time.time() - began
    if error is None and seconds > LIMIT:
        error = f"took {seconds:.0f} s, more than {LIMIT} s"
    if keep and error is None:
        notebook.metadata.pop("widgets", None)
        tidy(notebook)
        nbformat.write(notebook, path)
    return path, seconds, error


def in_step():
    """What `tools/export.py` and `nbdev_clean` would change, found on a copy: a list of messages."""
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        names = shutil.ignore_patterns(
            ".git",
            ".venv",
            ".runs",
            "weights",
            "_docs",
            "_proc",
            "_demo",
            "__pycache__",
            "data",
            "*.egg-info",
            "build",
            "dist",
        )
        shutil.copytree(ROOT, copy, ignore=names)
        for command in ([sys.executable, "tools/export.py"], [Path(sys.executable).parent / "nbdev_clean"]):
            subprocess.run(command, cwd=copy, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": ""})
        for path in [
            *ROOT.glob("nbs/*.ipynb"),
            *(p for p in ROOT.glob("dreamllm_edu/**/*.py") if not p.name.startswith("_")),
        ]:
            again = copy / path.relative_to(ROOT)
            if not again.exists() or again.read_bytes() != path.read_bytes():
                wrong.append(f"{path.relative_to(ROOT)}: out of step; run make export")
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", help="first characters of the notebooks' names")
    parser.add_argument("--keep", action="store_true", help="store the outputs")
    args = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    paths = [p for p in sorted((ROOT / "nbs").glob("*.ipynb")) if not args.only or p.name.startswith(tuple(args.only))]
    failed = 0
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for path, seconds, error in pool.map(lambda p: run(p, args.keep), paths):
            failed += error is not None
            print(
                f"{'FAILED' if error else 'ok':7}{path.name:28}{seconds:6.0f} s" + (f"\n{error}" if error else ""),
                flush=True,
            )
    if args.keep:
        subprocess.run([Path(sys.executable).parent / "nbdev_clean"], cwd=ROOT, check=True)
    messages = [] if args.keep else in_step()
    print("\n".join(messages + [f"{len(paths) - failed} passed, {failed + len(messages)} failed"]))
    return 1 if failed or messages else 0


if __name__ == "__main__":
    sys.exit(main())
