"""The command line, end to end. A tiny random model, saved with its processor, takes the shipped one's
place wherever that is enough."""

import ast
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from test_bad_input import parts_folder
from transformers import AutoConfig, AutoModel, AutoProcessor

import dreamllm_edu.app.cli
import dreamllm_edu.app.demo
import dreamllm_edu.evaluation.judge
import dreamllm_edu.evaluation.suite
import dreamllm_edu.models.dreamllm
import dreamllm_edu.pretraining
from dreamllm_edu import data
from dreamllm_edu.app.cli import main, parser
from dreamllm_edu.documents.document import Document
from dreamllm_edu.documents.formats import document_from_markdown, read_jsonl, write_jsonl
from dreamllm_edu.files import write_tensors
from dreamllm_edu.models.dreamllm.generation import GenerationOptions
from dreamllm_edu.models.dreamllm.model import DreamLLM
from dreamllm_edu.models.dreamllm.pipeline import DreamLLMPipeline
from dreamllm_edu.models.dreamllm.processor import DreamLLMProcessor
from dreamllm_edu.models.dreamllm.weights import is_shipped, load_trained, mini, save_trained
from dreamllm_edu.parts.tokenizer import SPECIAL_TOKENS, encode_text
from dreamllm_edu.training.checkpoint import last_checkpoint
from dreamllm_edu.training.features import FeatureStore
from dreamllm_edu.training.recipe import recipe_of
from dreamllm_edu.training.report import read_log

from conftest import ROOT, full_disk, make_tiny, picture, run_command

COMMANDS = {
    "demo": ["--out", "--n"],
    "pretrain": ["tokenizer", "judge", "--steps"],
    "train": ["--parts", "--steps", "--seed"],
    "plan": ["--gpus", "--gpu-memory", "--utilisation"],
    "generate": ["--model", "--guidance-scale", "--max-pictures"],
    "evaluate": ["--trained", "--n"],
}
QUICK = ["--num-inference-steps", "1", "--max-new-tokens", "6"]


@pytest.fixture(scope="module")
def model(tmp_path_factory, trained, processor):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    trained.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def refused(arguments, capsys, *words):
    """Exit status 1 and one line on standard error that holds `words`; returns the line."""
    capsys.readouterr()
    name = "dreamllm-edu train: " if arguments[0] == "train" else "dreamllm-edu: "
    assert main([str(a) for a in arguments]) == 1
    error = capsys.readouterr().err
    line = error.strip().splitlines()[-1]
    assert line.startswith(name) and "Traceback" not in error and error.count(name) == 1
    assert len(error[error.index(name):].strip().splitlines()) == 1, "the message must be one line"
    for word in words:
        assert word in line, line
    return line


# ---------------------------------------------------------------- help

def children_seconds():
    """Processor seconds of the commands that have ended: a busy machine does not count."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_reads_well_and_answers_at_once(tmp_path):
    for command in ("", *COMMANDS):
        began = children_seconds()
        run = run_command(*([command] if command else []), "--help", cwd=tmp_path)
        assert run.returncode == 0 and run.stderr == "" and run.stdout.startswith("usage: dreamllm-edu"), command
        for word in COMMANDS.get(command, COMMANDS):
            assert word in run.stdout, f"{command} --help does not tell of {word}"
        if command == "train":  # made by tyro from the settings: an option that may be left out shows None
            assert "(default: " in run.stdout and "--save-every" in run.stdout
        else:
            assert "None" not in run.stdout
        assert "==SUPPRESS==" not in run.stdout
        assert not command or "example: dreamllm-edu" in run.stdout or "| dreamllm-edu" in run.stdout
        assert 0 < children_seconds() - began < 5
    assert not list(tmp_path.iterdir())


def test_every_option_says_what_it_does_and_its_default():
    (commands,) = (a for a in parser()._actions if a.dest == "command")
    for name, command in commands.choices.items():
        text = " ".join(command.format_help().split())
        for action in command._actions:
            assert action.help and len(action.help) > 5, f"{name} {action.dest}: no help"
            if type(action.default) in (int, float, str) and action.dest not in ("help",):
                assert f"(default: {action.default})" in text, (
                    f"{name} --help does not tell the default of {action.dest}"
                )


def test_help_loads_no_heavy_library():
    code = (
        "import sys, dreamllm_edu.app.cli as c; c.parser().format_help(); "
        "assert not {'torch', 'transformers', 'diffusers', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["dream"],
        ["generate"],
        ["pretrain", "everything"],
        ["pretrain", "vae", "--steps", "0"],
        ["pretrain", "vae", "--steps", "x"],
        ["generate", "a.md", "--seed", "x"],
    ],
    ids=" ".join,
)
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and "usage: dreamllm-edu" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["--scale", "huge"], "huge"),
        (["--steps"], "--steps"),
        (["--steps", "1", "-2", "3"], "-2"),
        (["--steps", "x"], "x"),
        (["--batch", "0"], "batch"),
        (["--speed", "3"], "--speed"),
    ],
    ids=str,
)
def test_wrong_usage_of_train(arguments, word, capsys, tmp_path, monkeypatch):
    """Nothing is trained: status 2 for what the command line cannot hold, 1 for what no training can use."""
    import dreamllm_edu.app.train

    monkeypatch.setattr(dreamllm_edu.app.train, "train", lambda *_: pytest.fail("it trained"))
    try:
        code = main(["train", *arguments, "--out", str(tmp_path / "out")])
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code in (1, 2) and word in error and "dreamllm-edu train" in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_defaults_are_the_documented_ones():
    args = parser().parse_args(["generate", "-"])
    assert (args.model, args.seed) == ("mini", 0)
    own = GenerationOptions()
    for name in ("max_new_tokens", "max_pictures", "temperature", "top_p", "guidance_scale", "num_inference_steps"):
        assert getattr(args, name) == getattr(own, name), f"--{name} differs from model.generate"


# ---------------------------------------------------------------- generate

def test_generate_end_to_end(tmp_path, model):
    """In a process of its own, from a strange folder: Markdown with a picture, a wish and an escaped marker in, JSONL
    out."""
    picture(1).save(tmp_path / "cat.png")
    (tmp_path / "prompt.md").write_text(
        "cat: ![a cat](cat.png) a \\<dream> typed, and one wished: <dream>dog:", encoding="utf8"
    )
    run = run_command(
        "generate", "prompt.md", "--model", model, "--out", "deep/out.jsonl", "--seed", "3", *QUICK, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
    (document,) = read_jsonl(tmp_path / "deep" / "out.jsonl")
    assert [type(p) is str for p in document.parts[:5]] == [True, False, True, False, True] and document.given == 5
    assert (
        document.parts[0] == "cat: "
        and document.parts[2] == " a <dream> typed, and one wished: "
        and document.parts[4] == "dog:"
    )
    assert document.parts[1].tobytes() == picture(1).tobytes() and document.parts[3].size == (64, 64)
    assert len(document.parts) > 5, "after `dog:` the tiny model goes on by itself"
    assert "[picture]" in run.stdout and "deep/out.jsonl" in run.stdout and "Traceback" not in run.stderr
    again = run_command("generate", "deep/out.jsonl", "--model", model, "--out", "page.html", *QUICK, cwd=tmp_path)
    assert again.returncode == 0 and (tmp_path / "page.html").read_text().count("<img ") >= 2, (
        "what it writes, it can read and continue"
    )


def test_generate_from_standard_input(tmp_path, model, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("cat:<dream>"))
    assert main(["generate", "-", "--model", str(model), "--out", str(tmp_path / "out.md"), *QUICK]) == 0
    document = document_from_markdown((tmp_path / "out.md").read_text(encoding="utf8"))
    assert document.parts[0] == "cat:" and len(document.pictures) >= 1


def test_generate_is_repeatable_and_follows_its_options(tmp_path, model, capsys):
    write_jsonl([Document(["cat:"]), Document(["dog:"])], tmp_path / "in.jsonl")
    def ask(*options):
        assert (
            main(
                [
                    "generate",
                    str(tmp_path / "in.jsonl"),
                    "--model",
                    str(model),
                    "--out",
                    str(tmp_path / "o.jsonl"),
                    "--num-inference-steps",
                    "1",
                    *options,
                ]
            )
            == 0
        )
        return read_jsonl(tmp_path / "o.jsonl")
    one = ask("--max-new-tokens", "8")
    assert one == ask("--max-new-tokens", "8") != ask("--max-new-tokens", "8", "--seed", "5")
    assert sum(len(d.pictures) for d in one) >= 1 and not any(
        d.pictures for d in ask("--max-new-tokens", "8", "--max-pictures", "0")
    )
    assert [d.parts for d in ask("--max-new-tokens", "0")] == [["cat:"], ["dog:"]]


BAD_DOCUMENTS = {
    "gone.md": (None, "no such file"),
    "empty.md": (b"", "empty"),
    "binary.md": (b"\x89PNG\r\n\x1a\n\xff\xfe", "binary.md"),
    "web.md": (b"![](https://example.org/a.png)", "not fetched"),
    "lost.md": (b"see ![](gone.png)", "gone.png"),
    "empty.jsonl": (b"\n\n", "empty.jsonl"),
    "bad.jsonl": (b'{"parts": [{"text": "a"}]}\nnonsense\n', "bad.jsonl:2"),
    "cut.jsonl": (b'{"parts": [{"text": "a"', "cut.jsonl:1"),
    "no-parts.jsonl": (b'{"parts": []}', "empty"),
    "long.md": (b"word " * 3000, "context holds"),
    "many.md": (b"<dream>" * 60, "context holds"),
}


@pytest.mark.parametrize("name", BAD_DOCUMENTS)
def test_bad_documents(name, tmp_path, model, capsys):
    content, word = BAD_DOCUMENTS[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    refused(["generate", tmp_path / name, "--model", model, "--out", tmp_path / "out.html", *QUICK], capsys, word)
    assert not (tmp_path / "out.html").exists() and not list(tmp_path.glob("*.part"))


def test_bad_pictures_in_documents(tmp_path, model, capsys):
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(buffer, "PNG")
    (tmp_path / "cut.png").write_bytes(buffer.getvalue()[:-500])
    (tmp_path / "text.png").write_text("no picture")
    for name in ("cut.png", "text.png"):
        (tmp_path / "a.md").write_text(f"see ![]({name})")
        refused(
            ["generate", tmp_path / "a.md", "--model", model, "--out", tmp_path / "o.md", *QUICK],
            capsys,
            name,
            "not a readable picture",
        )


def test_a_bad_file_in_a_real_process(tmp_path):
    run = run_command("generate", "gone.md", "--out", "new/answer.html", cwd=tmp_path)
    assert not list(tmp_path.iterdir()), "no folder for an answer that never comes"
    assert run.returncode == 1 and "Traceback" not in run.stderr and run.stdout == ""
    assert run.stderr.strip().splitlines() == [
        next(line for line in run.stderr.splitlines() if line.startswith("dreamllm-edu: gone.md"))
    ]


def test_bad_models(tmp_path, capsys, model):
    (tmp_path / "a.md").write_text("cat:")
    ask = lambda folder, *words: refused(
        ["generate", tmp_path / "a.md", "--model", folder, "--out", tmp_path / "o.md", *QUICK], capsys, *words
    )
    ask(tmp_path / "gone", "gone")
    ask("some-hub/name", "some-hub/name")
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in model.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    (broken / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:5000])
    ask(broken, "broken", "damaged or cut off")


@pytest.mark.parametrize(
    "options,word",
    [
        (["--out", "a.pdf"], ".html, .md or .jsonl"),
        (["--top-p", "0"], "top_p"),
        (["--temperature", "-1"], "temperature"),
        (["--temperature", "nan"], "temperature"),
        (["--num-inference-steps", "0"], "num_inference_steps"),
        (["--max-new-tokens", "-1"], "max_new_tokens"),
        (["--guidance-scale", "-2"], "guidance_scale"),
    ],
    ids=str,
)
def test_bad_options(options, word, tmp_path, model, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.md").write_text("cat:<dream>")
    refused(["generate", "a.md", "--model", model, *options], capsys, word)
    assert [p.name for p in tmp_path.iterdir()] == ["a.md"]


@pytest.mark.parametrize("name", ["o.html", "o.md", "o.jsonl"])
def test_a_full_disk_keeps_the_old_page(name, tmp_path, model, capsys):
    (tmp_path / "a.md").write_text("cat:<dream>")
    (tmp_path / name).write_text("old")
    with full_disk(1000):
        refused(["generate", tmp_path / "a.md", "--model", model, "--out", tmp_path / name, *QUICK], capsys)
    assert (tmp_path / name).read_text() == "old" and sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ["a.md", name]
    )


def test_ctrl_c_ends_with_130(tmp_path, model, capsys, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt
    monkeypatch.setattr(dreamllm_edu.models.dreamllm.DreamLLM, "generate", stop)
    (tmp_path / "a.md").write_text("cat:")
    assert main(["generate", str(tmp_path / "a.md"), "--model", str(model), "--out", str(tmp_path / "o.md")]) == 130
    assert "stopped" in capsys.readouterr().err and not (tmp_path / "o.md").exists()


# ---------------------------------------------------------------- pretrain, train, evaluate

def test_pretrain_tokenizer_end_to_end(tmp_path):
    run = run_command("pretrain", "tokenizer", "--out", "parts", "--runs", "work", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    tokenizer = dreamllm_edu.pretraining.read_tokenizer(tmp_path / "parts" / "tokenizer")
    assert len(tokenizer) == 4096 and [tokenizer.convert_tokens_to_ids(t) for t in SPECIAL_TOKENS] == list(range(9))
    text = "red apple in Noto style: <dream> 日本 \n"
    ids = encode_text(tokenizer, text)
    assert (
        tokenizer.decode(ids) == text and min(ids) > 8 and len(encode_text(tokenizer, "red apple in Noto style")) <= 8
    )


def test_pretrain_says_what_is_missing(tmp_path, capsys):
    refused(
        ["pretrain", "unet", "--out", tmp_path / "p", "--runs", tmp_path / "w"],
        capsys,
        "unet needs tokenizer, clip, vae",
        "pretrain them first",
    )
    refused(
        ["pretrain", "clip", "--out", tmp_path / "p", "--runs", tmp_path / "w"],
        capsys,
        "clip needs tokenizer",
        "pretrain it first",
    )


def test_compile_is_asked_of_the_unet_alone(tmp_path, monkeypatch):
    asked = {}
    for name in ("pretrain_unet", "pretrain_vae"):
        monkeypatch.setattr(
            dreamllm_edu.pretraining, name, lambda out, name=name, **options: asked.update({name: options})
        )
    for need in ("tokenizer", "clip", "vae"):
        (tmp_path / "p" / need).mkdir(parents=True)
    for part in ("unet", "vae"):
        assert main(["pretrain", part, "--compile", "--out", str(tmp_path / "p"), "--runs", str(tmp_path / "w")]) == 0
    assert asked["pretrain_unet"]["compile"] is True and "compile" not in asked["pretrain_vae"]
    assert main(["pretrain", "unet", "--out", str(tmp_path / "p"), "--runs", str(tmp_path / "w")]) == 0
    assert not asked["pretrain_unet"].get("compile")


def test_ctrl_c_leaves_a_resumable_state_and_the_second_call_goes_on(tmp_path, capsys):
    """A real signal to a real process; the judge is the part that needs no other."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    # a shell's background job would ignore the signal
    start = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    command = [
        sys.executable,
        "-c",
        start + "from dreamllm_edu.app.cli import main; sys.exit(main())",
        "pretrain",
        "judge",
        "--out",
        "parts",
        "--runs",
        "work",
        "--steps",
        "60",
    ]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, env=environment)
    seen = b""
    while not re.search(rb"judge:.* [1-9]\d*/60", seen):  # the bar does not show every step
        piece = process.stderr.read1(4096)
        assert piece, f"it ended before its first step: {seen.decode()[-500:]}"
        seen += piece
    process.send_signal(signal.SIGINT)
    seen += process.stderr.read()
    assert process.wait(120) == 130 and b"Traceback" not in seen
    assert re.search(
        rb"dreamllm-edu: judge stopped after \d+ of 60 steps; run the same command again to resume from work/judge",
        seen,
    )
    made = last_checkpoint(tmp_path / "work" / "judge")[1]["step"]
    assert [p.name for p in (tmp_path / "work" / "judge").glob("step-*")] == [f"step-{made:08}"]
    assert 1 <= made < 60 and not (tmp_path / "parts" / "judge").exists()
    assert len((tmp_path / "work" / "judge" / "log.jsonl").read_text().splitlines()) == made
    again = ["pretrain", "judge", "--out", tmp_path / "parts", "--runs", tmp_path / "work", "--steps"]
    refused([*again, made], capsys, "another number of steps")
    assert main([str(word) for word in [*again, 60]]) == 0
    log = [json.loads(line) for line in (tmp_path / "work" / "judge" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == list(range(60)), "it went on where it stopped"
    assert (tmp_path / "parts" / "judge" / "model.safetensors").stat().st_size > 1_000_000
    record = json.loads((tmp_path / "parts" / "pretraining.json").read_text())
    assert (
        record.keys() == {"judge"}
        and record["judge"]["steps"] == 60
        and record["judge"]["seconds"] == pytest.approx(sum(row["seconds"] for row in log), abs=0.1)
    )


@pytest.mark.parametrize("part", ["clip", "unet", "all"])
def test_a_folder_to_go_on_from_that_is_not_there(part, tmp_path, capsys):
    for need in ("tokenizer", "clip", "vae"):
        (tmp_path / "p" / need).mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    for init in ["nowhere"] + ["empty"] * (part != "all"):
        refused(
            ["pretrain", part, "--init", tmp_path / init, "--out", tmp_path / "p", "--runs", tmp_path / "w"],
            capsys,
            init,
            "pretrain wrote",
        )


def test_the_record_of_several_trainings_adds_their_seconds_and_keeps_other_parts(tmp_path):
    rows = lambda *seconds: [{"step": i, "seconds": s} for i, s in enumerate(seconds)]
    keep = dreamllm_edu.pretraining.keep_record
    keep(tmp_path / "r.json", "clip", rows(1.0, 2.0, 3.0) + rows(0.5, 1.5))
    keep(tmp_path / "r.json", "vae", rows(7.0))
    assert json.loads((tmp_path / "r.json").read_text()) == {
        "clip": {"steps": 5, "seconds": 8.0},
        "vae": {"steps": 1, "seconds": 7.0},
    }


def test_train_end_to_end(tmp_path, monkeypatch, capsys, processor, world):
    """All stages on a small corner of the world, from parts of its own; then the same command again, which finds
    everything done."""
    parts_folder(make_tiny(4), tmp_path / "parts")
    processor.tokenizer.save_pretrained(tmp_path / "parts" / "tokenizer")
    names = {"cat", "dog", "rose", "bus", "key"}
    monkeypatch.setattr(data.readers, "World", lambda *a, **k: world)
    monkeypatch.setattr(
        world,
        "concepts",
        [
            c
            for c in world.concepts
            if c["name"] in names
            or any(up["name"] in ("citrus", "feline", "footwear") for up in c.get("hypernyms", []))
        ],
    )
    scenes = data.scene_list(world, "train")[::40]
    definitions = data.readers.read_definitions()[::100]
    monkeypatch.setattr(data.readers, "read_definitions", lambda: definitions)
    monkeypatch.setattr(data.tasks, "scene_list", lambda world, split, seed=0: scenes)
    small = recipe_of("mini").stages
    recipe = yaml.safe_load((ROOT / "recipes" / "mini.yaml").read_text(encoding="utf8"))
    for entry in recipe["stages"]:  # the package's own stages, three lanes and three documents a step
        entry["batch"] = 3
        entry["mixture"] = {
            name: {**part, "documents": 3} if isinstance(part, dict) else part
            for name, part in entry["mixture"].items()
        }
    recipe["settings"].update(lanes=3, views=2)
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(recipe))
    steps = [2] + [1] * (len(small) - 1)
    arguments = [
        "train",
        "--recipe",
        str(tmp_path / "small.yaml"),
        "--parts",
        str(tmp_path / "parts"),
        "--out",
        str(tmp_path / "out"),
        "--steps",
        *map(str, steps),
        "--seed",
        "4",
    ]
    assert main(arguments) == 0
    out = tmp_path / "out"
    assert {s.name: f"step-{n:08}" for s, n in zip(small, steps)} == {
        p.parent.name: p.name for p in out.glob("*/step-*")
    }
    assert {p.parent.name for p in out.glob("*/trained.safetensors")} == {s.name for s in small}
    assert {p.parent.name for p in out.glob("*/report.html")} == {s.name for s in small}
    assert all(len(read_log(out / s.name / "log.jsonl")) == n for s, n in zip(small, steps))
    fresh = mini(trained=False, parts=tmp_path / "parts")
    before = fresh.dream_queries.weight.clone()
    load_trained(fresh, out / "trained.safetensors")
    assert not torch.equal(before, fresh.dream_queries.weight) and torch.isfinite(fresh.dream_queries.weight).all()
    first = (out / "trained.safetensors").read_bytes()
    made = json.loads((out / "training.json").read_text())
    assert first == (out / small[-1].name / "trained.safetensors").read_bytes()
    assert [made[s.name]["steps"] for s in small] == steps and all(m["seconds"] > 0 for m in made.values())
    assert (
        main(arguments) == 0
        and (out / "trained.safetensors").read_bytes() == first
        and json.loads((out / "training.json").read_text()) == made
    )
    assert str(out / "trained.safetensors") in capsys.readouterr().out


def test_more_steps_than_stages_are_refused(tmp_path, capsys):
    refused(["train", "--steps", *"123456", "--out", tmp_path / "out"], capsys, "6 numbers of steps, but 5 stages")
    assert not (tmp_path / "out").exists()


def test_train_without_parts(tmp_path, capsys):
    refused(["train", "--parts", tmp_path / "gone", "--out", tmp_path / "out"], capsys, "gone")
    assert not (tmp_path / "out" / "trained.safetensors").exists()


# ---------------------------------------------------------------- the shipped miniature

def test_shipped_miniature_end_to_end(tmp_path):
    (tmp_path / "owl.md").write_text("owl in Noto style:<dream>")
    run = run_command(
        "generate", "owl.md", "--out", "owl.md", "--num-inference-steps", "4", "--max-new-tokens", "0", cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
    document = document_from_markdown((tmp_path / "owl.md").read_text())
    assert document.texts == ["owl in Noto style:"] and document.pictures[0].size == (64, 64)


def test_evaluate_refuses_a_missing_checkpoint_before_measuring(tmp_path, capsys):
    began = time.process_time()
    refused(
        ["evaluate", "--trained", tmp_path / "gone.safetensors", "--out", tmp_path / "m.json"],
        capsys,
        "gone.safetensors",
    )
    assert time.process_time() - began < 30 and not (tmp_path / "m.json").exists()


def test_weights_are_measured_on_the_parts_that_they_were_trained_on(tmp_path, monkeypatch, capsys, processor):
    for seed in (4, 5):
        parts_folder(make_tiny(seed), tmp_path / f"parts{seed}")
        processor.tokenizer.save_pretrained(tmp_path / f"parts{seed}" / "tokenizer")
    model = mini(trained=False, parts=tmp_path / "parts4")
    save_trained(model, tmp_path / "t.safetensors")
    asked = []
    monkeypatch.setattr(dreamllm_edu.evaluation.judge, "load_judge", lambda folder: None)
    monkeypatch.setattr(
        dreamllm_edu.evaluation.suite, "full_measure", lambda *a, parts, **k: asked.append(parts) or ({}, {})
    )
    command = ["evaluate", "--trained", tmp_path / "t.safetensors", "--out", tmp_path / "m.json", "--parts"]
    refused([*command, tmp_path / "parts5"], capsys, "t.safetensors was trained on other parts", "--parts")
    refused(
        ["train", "--init", tmp_path / "t.safetensors", "--out", tmp_path / "out", "--parts", tmp_path / "parts5"],
        capsys,
        "was trained on other parts",
    )
    assert not asked and not (tmp_path / "m.json").exists() and not (tmp_path / "out").exists()
    assert (
        main([*map(str, command), str(tmp_path / "parts4")]) == 0
        and asked == [tmp_path / "parts4"]
        and (tmp_path / "m.json").exists()
    )
    write_tensors(
        tmp_path / "t.safetensors", load_file(tmp_path / "t.safetensors")
    )  # as older versions wrote it, without a word about its parts: believed
    assert main([*map(str, command), str(tmp_path / "parts5")]) == 0


def test_train_says_when_the_weights_to_go_on_from_are_missing(tmp_path, capsys):
    init = tmp_path / "absent.safetensors"
    refused(["train", "--init", init, "--out", tmp_path / "out"], capsys, "absent.safetensors: no such file")
    assert not (tmp_path / "out").exists()


def test_plan_says_what_fits_and_what_does_not(capsys):
    line = ["plan", "--scale", "mini", "--gpus", "1", "--stage", "2", "--micro-batch", "2"]
    assert main(line) == 0 and "in all, each GPU" in capsys.readouterr().out
    assert main([*line, "--gpu-memory", "0.1"]) == 1 and "does not fit" in capsys.readouterr().err
    assert main([*line, "--stage", "6"]) == 1 and "stage=6: use one of 1, 2, 3" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_folder_without_parts_is_named(command, tmp_path, capsys):
    assert main([command, "--parts", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert (
        "nowhere: no pretrained parts there" in said and "dreamllm-edu pretrain all" in said and "Repo id" not in said
    )


def test_ctrl_c_while_features_are_computed_keeps_what_is_stored(tmp_path, monkeypatch, capsys, processor):
    """Status 130, no weights; the same command goes on where it stopped, and computes nothing twice."""
    parts_folder(make_tiny(4), tmp_path / "parts")
    processor.tokenizer.save_pretrained(tmp_path / "parts" / "tokenizer")
    stages = [{
        "name": "1-alignment", "trains": ["visual_projector", "dream_queries", "condition_projector"],
        "learning_rate": 1e-3, "steps": 1, "batch": 4, "mixture": {"subjects": 1.0},
    }]  # fmt: skip
    settings = {"lanes": 4, "store": True, "views": 2, "precision": "no"}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"settings": settings, "stages": stages}))
    command = ["train", "--recipe", "r.yaml", "--parts", "parts", "--out", "out", "--trackers"]
    monkeypatch.chdir(tmp_path)
    real, stored = FeatureStore.add, []

    def add(self, kind, keys, tensors):
        if len(stored) == 3:
            raise KeyboardInterrupt
        real(self, kind, keys, tensors)
        stored.append((kind, *keys))

    monkeypatch.setattr(FeatureStore, "add", add)
    assert main(command) == 130
    error = capsys.readouterr().err
    assert "dreamllm-edu train: stopped" in error and "Traceback" not in error
    assert len(stored) == 3 and not list((tmp_path / "out").rglob("trained.safetensors"))
    kept = {path: path.read_bytes() for path in (tmp_path / "out" / "features").rglob("*.safetensors")}
    assert len(kept) == 3
    again = []
    monkeypatch.setattr(FeatureStore, "add", lambda self, *a: (again.append((a[0], *a[1])), real(self, *a)))
    assert main(command) == 0
    assert all(path.read_bytes() == content for path, content in kept.items())
    first = {(kind, key) for kind, *keys in stored for key in keys}
    assert again and not first & {(kind, key) for kind, *keys in again for key in keys}, "nothing is computed twice"
    assert (tmp_path / "out" / "trained.safetensors").exists()


def test_ctrl_c_while_the_libraries_load(monkeypatch, capsys, tmp_path):
    monkeypatch.delitem(sys.modules, "dreamllm_edu.models.dreamllm.generation")

    class Stop:
        def find_spec(self, name, path=None, target=None):
            if name == "dreamllm_edu.models.dreamllm.generation":
                raise KeyboardInterrupt

    monkeypatch.setattr(sys, "meta_path", [Stop(), *sys.meta_path])
    (tmp_path / "a.md").write_text("cat:")
    assert (
        main(["generate", str(tmp_path / "a.md"), "--out", str(tmp_path / "o.md")]) == 130
        and "stopped" in capsys.readouterr().err
    )


def test_a_missing_part_is_named(tmp_path):
    from dreamllm_edu.parts.loading import parts_folder

    for part, file in (
        ("tokenizer", "tokenizer.json"),
        ("language", "config.json"),
        ("clip", "config.json"),
        ("vae", "config.json"),
        ("unet", "config.json"),
    ):
        (tmp_path / part).mkdir()
        (tmp_path / part / file).write_text("{}")
    with pytest.raises(ValueError, match="the part scheduler is missing; make it with dreamllm-edu pretrain unet"):
        parts_folder(tmp_path)
    assert parts_folder(tmp_path, needed=("tokenizer",)) == tmp_path


# ---------------------------------------------------------------- long lists, and readers who leave

def test_a_long_list_is_written_in_pieces_and_what_is_ready_is_kept(model, tmp_path, capsys, monkeypatch):
    prompts = [Document([text]) for text in ("cat:", "dog:", "a cat", "two", "cat: a")]
    write_jsonl(prompts, tmp_path / "p.jsonl")
    ask = lambda name: main(
        [
            "generate",
            str(tmp_path / "p.jsonl"),
            "--model",
            str(model),
            "--temperature",
            "1.5",
            "--out",
            str(tmp_path / name),
            *QUICK,
        ]
    )
    assert ask("whole.jsonl") == 0
    monkeypatch.setattr(dreamllm_edu.app.cli, "BATCH", 2)
    assert ask("pieces.jsonl") == 0
    whole = read_jsonl(tmp_path / "whole.jsonl")
    assert [d.texts for d in read_jsonl(tmp_path / "pieces.jsonl")] == [d.texts for d in whole] and len(whole) == 5
    real = dreamllm_edu.models.dreamllm.DreamLLM.generate

    def breaks(self, documents, *args, first=0, **options):
        if first == 4:
            raise ValueError("something broke")
        return real(self, documents, *args, first=first, **options)

    monkeypatch.setattr(dreamllm_edu.models.dreamllm.DreamLLM, "generate", breaks)
    capsys.readouterr()
    assert ask("part.jsonl") == 1
    assert "4 of 5 documents" in capsys.readouterr().out
    assert [d.texts for d in read_jsonl(tmp_path / "part.jsonl")] == [d.texts for d in whole[:4]]


def test_a_reader_who_leaves_early_does_not_cost_the_document(model, tmp_path):
    (tmp_path / "p.md").write_text("dog:\n")
    start = "import sys; from dreamllm_edu.app.cli import main; sys.stdin.read(); sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", start, "generate", "p.md", "--model", str(model), "--out", "d.md", *QUICK],
        cwd=tmp_path,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )
    process.stdout.close()  # before the first word comes
    process.stdin.close()
    error = process.stderr.read()
    assert process.wait(120) == 0 and "Broken" not in error, error
    assert document_from_markdown((tmp_path / "d.md").read_text(), tmp_path).texts


def test_a_terminal_without_the_letters_costs_no_document(model, tmp_path):
    (tmp_path / "p.md").write_text("dog:")
    command = [
        sys.executable,
        "-c",
        "import sys; from dreamllm_edu.app.cli import main, say; code = main(); say('\\N{SNOWMAN}'); sys.exit(code)",
        "generate",
        "p.md",
        "--model",
        str(model),
        "--out",
        "d.md",
        *QUICK,
    ]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0 and done.stdout.rstrip().endswith(b"?"), done.stderr


@pytest.mark.parametrize("start", ["", "\ufeff"], ids=["plain", "with a byte-order mark"])
@pytest.mark.parametrize("end", ["", "\n", "\r\n"], ids=["none", "newline", "of Windows"])
def test_what_editors_add_to_a_file_is_no_text(start, end, tmp_path):
    (tmp_path / "p.md").write_bytes(f"{start}cat:\nAssistant:{end}".encode())
    (document,) = dreamllm_edu.app.cli.read_prompts(tmp_path / "p.md")
    assert document.parts == ["cat:\nAssistant:"]


# ---------------------------------------------------------------- bytes in, bytes out

def bytes_as_stdin(data, encoding="utf8"):
    return io.TextIOWrapper(io.BytesIO(data), encoding)


@pytest.mark.parametrize("terminal", ["utf8", "cp1252", "ascii"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_prompt_is_read_alike_from_a_file_and_from_standard_input(encoding, terminal, tmp_path, monkeypatch):
    data = "Bär:\r\n日本\r\n".encode(encoding)
    (tmp_path / "p.md").write_bytes(data)
    monkeypatch.setattr(sys, "stdin", bytes_as_stdin(data, terminal))
    read = dreamllm_edu.app.cli.read_prompts
    assert read("-")[0].parts == read(tmp_path / "p.md")[0].parts == ["Bär:\n日本"]
    (tmp_path / "p.jsonl").write_bytes((Document(["Bär"]).to_json() + "\r\n").encode(encoding))
    if encoding != "utf-32":
        assert read(tmp_path / "p.jsonl")[0].parts == ["Bär"]


@pytest.mark.parametrize("data", ["Bär".encode("cp1252"), "Bär".encode("utf-16-le"), b"\xff\xfeabc"])
def test_what_is_no_text_is_refused_by_its_name(data, tmp_path, monkeypatch):
    (tmp_path / "p.md").write_bytes(data)
    monkeypatch.setattr(sys, "stdin", bytes_as_stdin(data, "cp1252"))
    for source, name in (("-", "standard input"), (tmp_path / "p.md", "p.md")):
        with pytest.raises(ValueError, match=f"{name}: not a text in UTF-8 .*save it as UTF-8"):
            dreamllm_edu.app.cli.read_prompts(source)


def test_closed_standard_input_is_an_error_and_a_terminal_has_its_own_encoding(monkeypatch, tmp_path):
    closed = bytes_as_stdin(b"")
    closed.close()
    for stdin in (None, closed):
        monkeypatch.setattr(sys, "stdin", stdin)
        with pytest.raises(ValueError, match="standard input is closed; give a file"):
            dreamllm_edu.app.cli.read_prompts("-")
    for typed, encoding, text in (("Bär".encode("cp1252"), "cp1252", "Bär"), (b"B\xe4r", "ascii", None)):
        terminal = bytes_as_stdin(typed, encoding)
        terminal.isatty = lambda: True
        monkeypatch.setattr(sys, "stdin", terminal)
        if text:
            assert dreamllm_edu.app.cli.read_prompts("-")[0].parts == [text]
        else:
            with pytest.raises(ValueError, match="standard input: not a text in ascii"):
                dreamllm_edu.app.cli.read_prompts("-")
    if os.name == "posix":
        code = "import sys; from dreamllm_edu.app.cli import main; sys.exit(main(['generate', '-']))"
        run = subprocess.run(["sh", "-c", f'"{sys.executable}" -c "{code}" <&-'], cwd=tmp_path, capture_output=True,
                             text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert run.returncode == 1 and "standard input is closed" in run.stderr and "Traceback" not in run.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_full_standard_output_costs_no_document(tmp_path, model):
    (tmp_path / "p.md").write_text("cat:<dream>dog:")
    command = [sys.executable, "-m", "dreamllm_edu", "generate", "p.md", "--model", model, "--out", "d.md", *QUICK]
    with open("/dev/full", "w") as full:
        run = subprocess.run(list(map(str, command)), cwd=tmp_path, stdout=full, stderr=subprocess.PIPE,
                             env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert run.returncode == 0 and (tmp_path / "d.md").exists(), run.stderr


# ---------------------------------------------------------------- known before the work

@pytest.mark.parametrize("out", ["/proc/x{}", "file.txt/x{}", "folder{}", "a" * 251 + "{}"], ids=lambda out: out[:12])
@pytest.mark.parametrize("command", ["generate", "evaluate", "demo", "pretrain"])
def test_an_output_that_cannot_be_written_is_refused_before_anything_is_loaded(command, out, tmp_path, monkeypatch,
                                                                              capsys):
    for place in ("dreamllm_edu.models.dreamllm.model.DreamLLM.from_pretrained",
                  "dreamllm_edu.evaluation.judge.load_judge", "dreamllm_edu.app.demo.World",
                  "dreamllm_edu.pretraining.pretrain"):
        monkeypatch.setattr(place, lambda *a, **k: pytest.fail("the work began"))
    monkeypatch.chdir(tmp_path)
    out = out.format(".html" if command in ("generate", "evaluate") else "12345")
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "file.txt").write_text("mine")
    (tmp_path / "folder12345").write_text("mine")  # a file where a folder is needed
    (tmp_path / "p.md").write_text("cat:<dream>")
    first = {"generate": ["p.md"], "pretrain": ["vae"]}.get(command, [])
    refused([command, *first, "--out", out], capsys, out[:10])
    assert {path.name for path in tmp_path.iterdir()} == {"folder.html", "file.txt", "folder12345", "p.md"}


def test_a_name_of_255_bytes_is_written(tmp_path, model):
    (tmp_path / "p.md").write_text("cat:<dream>")
    out = tmp_path / ("a" * 250 + ".html")
    assert main(["generate", str(tmp_path / "p.md"), "--model", str(model), "--out", str(out), *QUICK]) == 0
    assert "<img" in out.read_text(encoding="utf8")


# ---------------------------------------------------------------- one name, one model

@pytest.fixture
def own_mini(tmp_path, model, monkeypatch):
    """The current folder holds a model of one's own that is called `mini`."""
    shutil.copytree(model, tmp_path / "mini")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "mini"


def test_a_model_of_ones_own_named_mini_is_never_passed_over_in_silence(own_mini, trained, processor):
    own = lambda model: torch.equal(model.dream_queries.weight, trained.dream_queries.weight)
    for cls in (DreamLLM, DreamLLMProcessor, DreamLLMPipeline):
        with pytest.raises(ValueError, match="'mini' is the shipped model, but .*write './mini'"):
            cls.from_pretrained("mini")
        for name in ("./mini", Path("mini"), own_mini, "mini/"):
            cls.from_pretrained(name)
    assert own(DreamLLM.from_pretrained("./mini")) and own(DreamLLM.from_pretrained(Path("mini")))
    assert own(DreamLLMPipeline.from_pretrained(Path("mini")).model)
    assert own(AutoModel.from_pretrained("mini")), "the auto classes know no shipped model"
    assert AutoConfig.from_pretrained("mini").num_queries == trained.config.num_queries
    assert AutoProcessor.from_pretrained("./mini").num_queries == processor.num_queries
    with pytest.raises(ValueError, match="./mini"):
        AutoProcessor.from_pretrained("mini")


def test_generate_takes_the_mini_that_is_named(own_mini, capsys):
    (own_mini.parent / "p.md").write_text("cat:<dream>")
    command = ["generate", "p.md", "--out", "o.md", *QUICK]
    refused(command, capsys, "'mini' is the shipped model", "./mini")
    assert main([*command, "--model", "./mini"]) == 0
    own_mini.rename("other")
    assert not (own_mini.parent / "mini").exists() and is_shipped("mini")


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch], ids=["folder", "file"])
def test_anything_else_named_mini_is_mentioned(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "mini")
    with pytest.warns(UserWarning, match="write './mini' for the file or folder mini"):
        assert is_shipped("mini")
    with pytest.warns(UserWarning, match="'./mini'"):
        assert DreamLLMProcessor.from_pretrained("mini").tokenizer.vocab_size == 4096
    for name in (Path("mini"), "./mini", "Mini", "some/mini"):
        assert not is_shipped(name)
    for cls in (DreamLLM, DreamLLMProcessor):
        with pytest.raises((ValueError, OSError)):
            cls.from_pretrained(Path("mini"), local_files_only=True)


def test_parts_may_lie_in_a_folder_named_shipped(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert parser().parse_args(["evaluate", "--parts"]).parts is True
    refused(["evaluate", "--parts", "shipped", "--out", "m.json"], capsys, "shipped: no pretrained parts there")


# ---------------------------------------------------------------- python -m, and other systems

@pytest.mark.parametrize("module, command", [
    ("", None), (".cli", None), (".app.cli", None), (".train", None), (".__main__", None),
    (".planning", " plan"), (".planner", " plan"), (".app.demo", " demo"), (".demo", " demo"), (".app.train", ".train"),
    (".app", ""), (".evaluation", " evaluate"), (".evaluation.suite", " evaluate"), (".pretraining", " pretrain"),
    (".models.dreamllm.generation", " generate"), (".files", ""), (".data.world", ""), (".training.trainer", ".train"),
])
def test_python_m_is_the_command_line_or_names_it(module, command, tmp_path):
    run = subprocess.run([sys.executable, "-m", f"dreamllm_edu{module}", "--nonsense"], cwd=tmp_path, text=True,
                         capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert "Traceback" not in run.stderr
    if command is None:
        assert run.returncode == 2 and "usage" in run.stderr.lower() or "nonsense" in run.stdout + run.stderr
    else:
        assert run.returncode == 1 and run.stderr.strip().endswith(f"the command is python -m dreamllm_edu{command}")


WINDOWS = """
import builtins, pkgutil, sys
real = builtins.__import__
def windows(name, globals=None, *rest, **named):
    inside = str((globals or {}).get("__name__")).startswith("dreamllm_edu")
    if inside and name in ("resource", "fcntl", "pwd", "grp", "termios", "posix", "pty", "tty", "syslog"):
        raise ModuleNotFoundError(f"No module named {name!r}")
    return real(name, globals, *rest, **named)
builtins.__import__ = windows
import dreamllm_edu
for module in pkgutil.walk_packages(dreamllm_edu.__path__, "dreamllm_edu."):
    if not module.name.endswith("__main__"):
        __import__(module.name)
from dreamllm_edu.app.cli import main
from dreamllm_edu.training.trainer import resident_memory_mb
assert resident_memory_mb() == 0
assert main(["plan", "--scale", "mini", "--gpus", "1"]) == 0
assert main(["generate", "p.md", "--model", sys.argv[1], "--out", "o.md", "--num-inference-steps", "1"]) == 0
assert main(["pretrain", "judge", "--steps", "1"]) == 0
"""


def test_modules_and_commands_work_without_what_only_unix_has(tmp_path, model):
    (tmp_path / "p.md").write_text("cat:<dream>")
    run = subprocess.run([sys.executable, "-c", WINDOWS, str(model)], cwd=tmp_path, capture_output=True, text=True,
                         env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    for path in (path for path in tmp_path.rglob("*") if path != tmp_path):
        assert not re.search(r'[<>:"|?*\\]|[. ]$', path.name), f"Windows allows no file named {path.name}"


def opens_text(node):
    """Whether a call opens a file as text without saying its encoding."""
    named = {keyword.arg: keyword.value for keyword in node.keywords}
    method = isinstance(node.func, ast.Attribute)
    name = node.func.attr if method else getattr(node.func, "id", "")
    owner = node.func.value.id if method and isinstance(node.func.value, ast.Name) else ""
    if "encoding" in named or owner in ("Image", "os", "fsspec", "tarfile", "zipfile", "archive"):
        return False
    if name == "read_text":
        return method and not node.args
    if name == "write_text":
        return method and len(node.args) < 2
    if name == "open" and (not method or node.args or named):
        values = [a.value for a in [*node.args, *named.values()] if isinstance(a, ast.Constant)]
        modes = [value for value in values if isinstance(value, str)]
        return not any("b" in mode for mode in modes if set(mode) <= set("rwaxbt+"))
    return name in ("fdopen", "NamedTemporaryFile", "TextIOWrapper")


@pytest.mark.parametrize("path", sorted((ROOT / "dreamllm_edu").rglob("*.py")), ids=lambda path: path.stem)
def test_text_files_are_opened_in_utf8_on_every_system(path):
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))) if isinstance(node, ast.Call)]
    assert [f"{path.name}:{node.lineno}" for node in calls if opens_text(node)] == []


UNIX = set((
    "O_DIRECTORY SIGALRM SIGCHLD SIGHUP SIGKILL SIGSTOP SIGUSR1 SIGUSR2 alarm chown fork getegid geteuid "
    "getgid getloadavg getuid kill killpg mkfifo nice pause pread pthread_kill sched_getaffinity "
    "sched_setaffinity setitimer statvfs sysconf tzset uname wait"
).split())


@pytest.mark.parametrize("path", sorted((ROOT / "dreamllm_edu").rglob("*.py")), ids=lambda path: path.stem)
def test_what_only_unix_has_is_asked_for_first(path):
    text = path.read_text(encoding="utf8")
    used = {node.attr for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
            and node.value.id in ("os", "signal", "time") and node.attr in UNIX}
    assert [name for name in used if f'"{name}")' not in text] == [], "not on Windows; guard it with hasattr"
    assert "/tmp" not in re.sub(r"#.*", "", text), "use tempfile"
