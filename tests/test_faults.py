"""The parts of `benchmarks/faults.py` in a short form: a few kills, pictures, texts, checkpoints and full disks, and
threads. The long form, with its figures, is the page "Robustness" of the documentation."""

import json
import random
import sys
from pathlib import Path

import pytest

from conftest import ROOT, make_tiny, picture

sys.path.append(str(ROOT / "benchmarks"))

from fault_parts import disk, fuzz, hostile, in_fork, kills, pictures, threads  # noqa: E402

from dreamllm_edu.models.dreamllm import DreamLLM  # noqa: E402
from dreamllm_edu.training.features import FeatureStore  # noqa: E402
from dreamllm_edu.training.report import read_log  # noqa: E402

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks processes")


def whole(rows):
    """Fail with the misses of all rows."""
    assert rows and all(line["tried"] for line in rows)
    assert [miss for line in rows for miss in line["misses"]] == []


def test_kill_9_at_any_moment_changes_no_bit(tmp_path):
    whole([kills.small_row(tmp_path / "small", 8, random.Random(1))])


def test_damaged_pictures_shift_no_other(tmp_path):
    whole(pictures.run(tmp_path, True, seed=1))


def test_fuzzed_texts_inject_no_special_token(tmp_path):
    whole(fuzz.run(tmp_path, True, seed=1))


@pytest.mark.parametrize("name", ["miniature", "Llama (bytes as fallback)", "Unigram (as T5)", "whole words"])
def test_markers_alone_are_text_for_every_kind_of_tokenizer(name):
    from dreamllm_edu.parts.tokenizer import encode_text

    tokenizer = fuzz.tokenizers()[name]
    for marker in ["<s>", "</s>", "a </s> cat", *fuzz.MARKERS]:
        assert not set(encode_text(tokenizer, marker)) & fuzz.special_ids(tokenizer), marker


def test_hostile_folders_run_no_code(tmp_path):
    import dreamllm_edu.app.cli  # noqa: F401  loaded before the forks
    import dreamllm_edu.models.dreamllm.generation  # noqa: F401

    cases = hostile.Cases(tmp_path)
    for build in hostile.BUILDERS:
        build(cases)
    assert len({kind for kind, *_ in cases.all}) == len(hostile.BUILDERS)
    cases.all = cases.all[1::9]
    assert [f"{name}: {wrong}" for _, name, wrong, _ in hostile.results(cases) if wrong] == []


@pytest.mark.parametrize("change", [[1], "[" * 100_000 + "]" * 100_000, {"num_hidden_layers": 10**7},
                                    {"hidden_size": -32}, {"hidden_size": "32"}],
                         ids=["a list", "deep", "10^7 layers", "a size below zero", "a size as text"])  # fmt: skip
def test_a_config_that_cannot_be_is_refused_in_time(change, tmp_path):
    make_tiny().save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / "config.json"
    made = json.loads(path.read_text())
    if isinstance(change, dict):
        made["text_config"].update(change)
    path.write_text(change if isinstance(change, str) else json.dumps(made if isinstance(change, dict) else change))
    said = in_fork(lambda: str(DreamLLM.from_pretrained(tmp_path / "a")), timeout=30, memory=2**31)
    assert said.startswith("ERROR ValueError") and str(tmp_path / "a") in said


@pytest.mark.parametrize("line", ["[1]", "3", "{}", '{"step": "x"}', "[" * 100_000],
                         ids=["a list", "a number", "no step", "a step as text", "deep"])  # fmt: skip
def test_a_log_ends_where_it_is_no_log(line, tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 0}\n' + line + "\n")
    assert read_log(tmp_path / "log.jsonl") == [{"step": 0}]


def test_a_full_disk_loses_nothing(tmp_path):
    whole(disk.run(tmp_path, True, seed=1))


def test_a_damaged_index_of_features_is_named(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "index.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(OSError, match="index.sqlite"):
        FeatureStore(tmp_path, "x")


@pytest.mark.parametrize("training, typed", [(False, False), (False, True), (True, False)],
                         ids=["one model", "tokenizer in use", "training mode"])  # fmt: skip
def test_eight_threads_get_the_answers_of_one(training, typed, trained, processor):
    """One model and one processor; in training mode with dropout, which acts if a thread that ends switches it on."""
    import copy

    model = copy.deepcopy(trained)  # its dropout is changed
    words = ["a red cat in Noto style:", "cat:", "dog:", "User: what is this?\nAssistant:"]
    questions = threads.prompts(model, [picture(i) for i in range(5)], words)
    options = {"max_new_tokens": 24, "max_pictures": 1, "num_inference_steps": 2}
    tried, misses, _ = threads.compare(model, processor, questions, options, 2, training, typed)
    assert tried == 16 and misses == []


def test_the_page_shows_what_was_measured():
    made = json.loads((ROOT / "benchmarks" / "faults.json").read_text())
    cells = json.loads((ROOT / "nbs" / "robustness.ipynb").read_text())["cells"]
    shown = "".join(json.dumps(cell.get("outputs", "")) for cell in cells)
    for part in made.values():
        assert not part["quick"] and part["seconds"]
        for line in part["rows"]:
            assert line["tried"] == line["held"] + len(line["misses"])
            assert f"{line['held']:,} of {line['tried']:,}" in shown
    assert Path(ROOT / "benchmarks" / "faults.py").exists()
