"""`make gpu` runs from a tree that holds little, without the packages of developers, and writes what it promises."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT

REFUSED = ("datasets", "execnb", "IPython", "matplotlib", "nbdev", "pandas", "pytest", "tyro")
WITHOUT = f"""
import runpy, sys
from importlib.machinery import PathFinder

class Hidden:
    find_distributions = PathFinder.find_distributions

    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name.split(".")[0] in {REFUSED!r} else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Hidden
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def small_tree(folder):
    """The source tree as `tests/gpu/bundle.py --without-weights` packs it."""
    packed = folder / "bundle.tar.gz"
    command = [sys.executable, str(ROOT / "tests/gpu/bundle.py"), "--without-weights", "--out", str(packed)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "tests" in done.stdout and packed.stat().st_size < 2**20
    shutil.unpack_archive(packed, folder / "tree", filter="data")
    assert {path.name for path in (folder / "tree").iterdir()} == {"Makefile", "dreamllm_edu", "recipes", "tests"}
    return folder / "tree"


def run_script(tree, *arguments):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WITHOUT, "tests/gpu/check.py", *map(str, arguments)]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=300, env=environment)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return small_tree(tmp_path_factory.mktemp("gpu"))


def test_two_checks_in_a_bare_tree_pass_and_are_reported(tree):
    done = run_script(tree, "--cpu", "--only", "losses", "attention", "--out", "found")
    assert done.returncode == 0, done.stdout + done.stderr
    data, text = json.loads((tree / "found/gpu.json").read_text()), (tree / "found/gpu.md").read_text()
    assert data["mode"] == "cpu" and "no GPU" in done.stdout and "No GPU was found" in text
    assert data["status"] == "pass" and not data["left_out"] and data["seconds"] <= data["bound_seconds"]
    assert data["versions"]["torch"] and data["versions"]["cuda"] and "FLOPs" in data["flop_convention"]
    assert [check["name"] for check in data["checks"]] == ["losses", "attention"]
    rows = [row for check in data["checks"] for row in check["rows"]]
    assert {row["status"] for row in rows} == {"pass", "skipped", "measured"}
    assert all((row["value"] is None) == (row["status"] == "skipped") for row in rows)
    assert all(row["tolerance"] for row in rows if row["status"] == "pass")
    assert all(row["reason"] for row in rows if row["status"] == "skipped")
    assert all(row["what"].replace("|", "\\|") in text for row in rows)


def test_a_check_that_fails_does_not_stop_the_others_and_time_that_runs_out_is_named(tree):
    """The model is spoilt: its losses are NaN. Then: no time at all."""
    model = tree / "dreamllm_edu/parts/denoising.py"
    whole = model.read_text()
    try:
        spoilt = whole.replace("losses = (out.float() - target)", "losses = float('nan') * (out.float() - target)")
        assert spoilt != whole
        model.write_text(spoilt)
        done = run_script(tree, "--cpu", "--only", "losses", "attention", "--out", "spoilt")
    finally:
        model.write_text(whole)
    data = json.loads((tree / "spoilt/gpu.json").read_text())
    assert done.returncode == 1 and data["status"] == "fail"
    assert [check["status"] for check in data["checks"]] == ["fail", "pass"]
    bad = [row for row in data["checks"][0]["rows"] if row["status"] == "fail"]
    assert bad and all(row["value"] is None and row["reason"] == "not finite" for row in bad)

    done = run_script(tree, "--cpu", "--only", "losses", "--out", "late", "--bound", "5")
    data = json.loads((tree / "late/gpu.json").read_text())
    assert done.returncode == 1 and data["status"] == "fail"
    assert [left["name"] for left in data["left_out"]] == ["losses"]
