"""What a recipe, a command line and a launcher say is done, or refused before the work: precision, settings, outputs,
another run in the same folder; what the log says of speed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import yaml
from test_train import QUICK, ROOT, run, some_corpora, stage

from dreamllm_edu import files, pretraining
from dreamllm_edu import train as train_module
from dreamllm_edu.app import train as command
from dreamllm_edu.app.cli import main as cli
from dreamllm_edu.models.dreamllm.family import DreamLLMFamily
from dreamllm_edu.training import checkpoint, precision, report
from dreamllm_edu.training.checkpoint import last_checkpoint, save_checkpoint
from dreamllm_edu.training.features import row_of
from dreamllm_edu.training.fit import fit
from dreamllm_edu.training.precision import bf16_is_native, choose_precision, describe_precision
from dreamllm_edu.training.recipe import corpora_of, read_recipe, recipe_of
from dreamllm_edu.training.report import peak_flops, read_log
from dreamllm_edu.training.stage import LEARNED_FROM, Settings, Stage
from dreamllm_edu.training.strategies import Strategy, deepspeed_options
from dreamllm_edu.training.trainer import speed, train_part

from conftest import make_tiny, picture

# --- what is learned at the end of an answer


@pytest.mark.parametrize("scale", ["mini", "small", "paper"])
def test_instruction_stages_learn_to_end_an_answer_behind_a_picture(scale, processor):
    """The `</s>` behind a drawing is a label in stage III, or the model would never learn to stop there."""
    layout, end = processor.layout, processor.layout.id["</s>"]
    answer = SimpleNamespace(parts=["User: draw a cat\nAssistant:", picture(1)], learn=[False, True], name="answer")
    for what in recipe_of(scale).stages:
        row = row_of(answer, layout, what.read_last)
        assert row.targets, "the picture is drawn"
        assert (row.labels[-1] == end) == what.name.startswith("3"), what.name


# --- precision


@pytest.fixture
def processor_without_bf16(monkeypatch):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    monkeypatch.setattr(precision.platform, "machine", lambda: "x86_64")


@pytest.fixture
def processor_with_bf16(monkeypatch):
    monkeypatch.setattr(precision, "bf16_is_native", lambda device="cpu": torch.device(device).type == "cpu")
    monkeypatch.setattr(precision, "bf16_is_faster", lambda: True)


@pytest.mark.parametrize("avx, amx, machine, onednn, native", [
    (True, False, "x86_64", True, True), (False, True, "AMD64", True, True), (False, False, "x86_64", True, False),
    (False, False, "aarch64", True, True), (False, False, "arm64", False, False), (True, True, "x86_64", False, False),
])  # fmt: skip
def test_bf16_is_native_where_the_processor_has_instructions(monkeypatch, avx, amx, machine, onednn, native):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(precision.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    monkeypatch.setattr(precision, "bf16_is_faster", lambda: True)
    assert bf16_is_native() is native and choose_precision() == ("bf16" if native else "no")
    assert choose_precision("bf16") == "bf16" and choose_precision("no") == "no", "what is given stays"


def test_a_build_without_onednn_has_no_bf16(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not bf16_is_native()


def test_instructions_that_are_slower_are_not_used(monkeypatch):
    monkeypatch.setattr(precision, "bf16_is_native", lambda device="cpu": True)
    monkeypatch.setattr(precision, "bf16_is_faster", lambda: False)
    assert choose_precision() == "no" and choose_precision("auto", "cuda") == "bf16", "a GPU is not timed"
    assert describe_precision() == "no: float32 (bfloat16 is slower on this processor)"
    assert describe_precision("bf16").startswith("bf16 (as given; this processor is slower in bfloat16")


@pytest.mark.parametrize("slow", [torch.float32, torch.bfloat16])
def test_the_faster_precision_is_found_by_timing(monkeypatch, slow):
    clock = [0.0]
    monkeypatch.setattr(precision.time, "perf_counter", lambda: clock[0])

    class Matrix:
        def __init__(self, *size, dtype):
            self.seconds = 2.0 if dtype is slow else 1.0

        def __matmul__(self, other):
            clock[0] += self.seconds

    monkeypatch.setattr(torch, "ones", Matrix)
    assert precision.bf16_is_faster.__wrapped__() is (slow is torch.float32)


def test_asking_is_cheap():
    choose_precision()
    began = time.perf_counter()
    for _ in range(100):
        choose_precision()
    assert time.perf_counter() - began < 0.1


def test_a_gpu_without_bf16_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla P100")
    assert choose_precision("auto", "cuda") == "no" and "this GPU would only emulate" in describe_precision(
        "auto", "cuda"
    )
    with pytest.raises(ValueError, match="Tesla P100 has no bfloat16; use no, or auto"):
        choose_precision("bf16", "cuda")


def test_precision_is_described(processor_without_bf16):
    assert describe_precision("auto") == "no: float32 (this processor would only emulate bfloat16)"
    assert describe_precision("bf16").startswith("bf16 (as given; this processor only emulates bfloat16")
    assert describe_precision("no") == "no: float32 (as given)"
    with pytest.raises(ValueError, match="precision='fp16' is not possible here: use one of auto, bf16, no"):
        choose_precision("fp16")


def seen_dtypes(train):
    """The dtypes in which a layer's products come out while `train(model, loss)` trains it."""
    found = set()

    def loss(model, step, generator):
        out = model(torch.ones(4, 3))
        found.add(out.dtype)
        return {"loss": out.float().square().mean()}

    train(torch.nn.Linear(3, 3), loss)
    return found


@pytest.mark.parametrize("native", [False, True])
def test_every_loop_follows_the_processor(monkeypatch, native):
    monkeypatch.setattr(precision, "bf16_is_native", lambda device="cpu": native)
    monkeypatch.setattr(precision, "bf16_is_faster", lambda: True)
    expected = {torch.bfloat16 if native else torch.float32}
    loops = (
        lambda model, loss, **more: fit(model, loss, 1, 1e-3, progress=False, **{"precision": "auto", **more}),
        lambda model, loss, **more: train_part(model, loss, 1, 1e-3, progress=False, **more),
    )
    for loop in loops:
        assert seen_dtypes(loop) == expected
        for given, dtype in (("no", torch.float32), ("bf16", torch.bfloat16)):
            assert seen_dtypes(partial(loop, precision=given)) == {dtype}
    with_default = lambda model, loss: fit(model, loss, 1, 1e-3, progress=False)
    assert seen_dtypes(with_default) == {torch.float32}, "the lesson's loop is float32 unless one asks"


def test_the_shipped_recipes_follow_the_processor_and_the_log_says_so(processor, tmp_path, processor_without_bf16):
    assert {recipe_of(scale).settings.precision for scale in ("mini", "small", "paper")} == {"auto"}
    rows = run(make_tiny(), processor, stage(2, steps=1), some_corpora(), tmp_path, replace(QUICK, precision="auto"))
    assert (
        [row["precision"] for row in rows] == [row["precision"] for row in read_log(tmp_path / "log.jsonl")] == ["no"]
    )
    assert "precision no" in report.report(tmp_path).read_text()


@pytest.mark.parametrize("word, expected", [("no", "no"), ("bf16", "bf16"), ("auto", "auto"), ("'no'", "no")])
def test_a_recipe_names_a_precision(tmp_path, word, expected):
    """YAML reads a bare `no` as false."""
    (tmp_path / "r.yaml").write_text(f"settings: {{precision: {word}}}\nstages: []")
    assert read_recipe(tmp_path / "r.yaml").settings.precision == expected
    assert command.read_options(["--recipe", str(tmp_path / "r.yaml")])[1].settings.precision == expected


# --- launchers


@pytest.mark.parametrize(
    "launcher, option, expected",
    [
        ("bf16", "no", "trains with no"),
        ("fp16", None, "fp16, which is not possible"),
        ("fp8", None, "fp8, which is not possible"),
        ("int8", None, "int8, which is not possible"),
        ("no", None, "trains with no"),
        ("bf16", None, "trains with bf16"),
        ("BF16", None, "trains with bf16"),
        ("", None, "trains with bf16"),  # what the recipe says: auto
        (None, None, "trains with bf16"),
        (None, "no", "trains with no"),
        ("no", "bf16", "trains with bf16"),
        ("fp16", "bf16", "trains with bf16"),
        ("fp8", "no", "trains with no"),
        ("no", "auto", "trains with bf16"),
        (None, "fp16", "invalid"),
    ],
)
def test_the_command_line_wins_over_the_launcher(monkeypatch, capsys, processor_with_bf16, launcher, option, expected):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launcher is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    monkeypatch.setattr(train_module, "run", lambda *a, **k: sys.exit("trains with " + a[5].precision))
    line = ["--steps", "1", "--out", "/dev/null/x", "--trackers", *(["--precision", option] if option else [])]
    if expected == "invalid":
        with pytest.raises(SystemExit, match="^2$"):
            train_module.main(line)
        assert "precision='fp16': use one of auto, bf16, no" in capsys.readouterr().err
    elif expected.startswith("trains"):
        with pytest.raises(SystemExit, match=f"^{expected}$"):
            train_module.main(line)
        chosen = expected.split()[-1]
        assert capsys.readouterr().out.startswith(f"precision {chosen}"), "and it is reported first"
    else:
        assert train_module.main(line) == 1
        error = capsys.readouterr().err
        assert expected in error and "--precision bf16 or no" in error and error.count("\n") == 1


@pytest.mark.parametrize("variables, message", [
    ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
    ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "give --compile"),
    ({"ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params"),
    ({"ACCELERATE_USE_FSDP": "true", "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "give --checkpointing"),
    ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, "another zero_stage than 3"),
    ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}, "offload"),
])  # fmt: skip
def test_what_a_launcher_asks_for_in_vain_is_refused(monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"the launcher asks for .*{message}"):
        command.launcher_settings(Settings(), 2)


def test_a_launcher_chooses_the_strategy_but_the_command_line_wins(monkeypatch):
    assert command.launcher_settings(Settings(), 2).strategy == "ddp"
    assert command.launcher_settings(Settings(), 1).strategy == "auto"
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "some.json")
    chosen = command.launcher_settings(Settings(), 2)
    assert (chosen.strategy, chosen.deepspeed) == ("zero3", "some.json"), "its file is read, too"
    assert command.launcher_settings(Settings(deepspeed="own.json"), 2).deepspeed == "own.json"
    assert command.launcher_settings(Settings(strategy="ddp"), 2).deepspeed == ""


@pytest.mark.parametrize("given, message", [
    ({"fp16": {"enabled": True}}, "fp16 and amp are not possible"),
    ({"amp": {"enabled": True}}, "fp16 and amp are not possible"),
    ({"bf16": {"enabled": True}}, "it asks for bf16, but the precision is no"),
    ({"zero_optimization": {"stage": 2}}, "stage 2 of ZeRO; only 3"),
    ({"gradient_clipping": 0.5}, "it clips at 0.5, the settings at 1.0"),
])  # fmt: skip
def test_deepspeeds_configuration_must_fit(tmp_path, given, message):
    (tmp_path / "ds.json").write_text(json.dumps(given))
    with pytest.raises(ValueError, match=message):
        deepspeed_options(Settings(deepspeed=str(tmp_path / "ds.json")))


def test_deepspeeds_configuration_may_leave_it_to_the_trainer(tmp_path):
    auto = {"fp16": {"enabled": "auto"}, "bf16": {"enabled": True}, "gradient_clipping": "auto",
            "zero_optimization": {"stage": 3}}  # fmt: skip
    (tmp_path / "ds.json").write_text(json.dumps(auto))
    options = deepspeed_options(Settings(deepspeed=str(tmp_path / "ds.json"), precision="bf16"))
    assert not {"fp16", "bf16"} & set(options) and options["torch_autocast"]["enabled"] is True


def test_a_launchers_real_configuration_file(tmp_path):
    """`accelerate launch` itself, whose file says fp16: refused in one line."""
    (tmp_path / "config.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nmachine_rank: 0\nnum_machines: 1\n"
        "num_processes: 1\n"
        "mixed_precision: fp16\nuse_cpu: true\n"
    )
    line = ["-m", "accelerate.commands.launch", "--config_file", tmp_path / "config.yaml", "-m", "dreamllm_edu.train",
            "--steps", "1", "--out", tmp_path / "out"]  # fmt: skip
    ended = in_process(*line)
    assert ended.returncode and "the launcher asks for mixed_precision fp16" in ended.stderr
    assert not (tmp_path / "out").exists()


def in_process(*arguments, **more):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), **more}
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=300,
                          env=environment, cwd=ROOT)  # fmt: skip


# --- time to save


def test_slurm_leaves_the_ranks_the_time_that_it_promises():
    from torch.distributed.launcher.api import LaunchConfig

    text = (ROOT / "recipes" / "slurm.sh").read_text()
    seconds = int(re.search(r"--signal=TERM@(\d+)", text)[1])
    given = int(re.search(r"export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)", text)[1])
    assert seconds == given == 120 and "two minutes" in text
    assert subprocess.run(["bash", "-n", ROOT / "recipes" / "slurm.sh"]).returncode == 0
    if hasattr(LaunchConfig, "shutdown_timeout"):  # torch 2.12 or newer; with an older one the script refuses
        os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(given)
        try:
            assert LaunchConfig(1, 1, 1).shutdown_timeout == given
        finally:
            del os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]


@pytest.mark.parametrize("granted, saved", [(1, False), (60, True)])
def test_slurms_script_lets_a_rank_finish_a_slow_save(tmp_path, granted, saved):
    """The script itself, with SLURM's two programs replaced, and ranks that take three seconds to save. The control
    grants one second."""
    text = (ROOT / "recipes" / "slurm.sh").read_text().replace("-m dreamllm_edu.train", str(tmp_path / "rank.py"))
    (tmp_path / "slurm.sh").write_text(re.sub(r"TIMEOUT=\d+", f"TIMEOUT={granted}", text))
    (tmp_path / "rank.py").write_text(
        "import os, pathlib, signal, sys, time\n"
        f"here = pathlib.Path({str(tmp_path)!r}) / os.environ['RANK']\n"
        "def stop(*_):\n    time.sleep(3)\n    here.with_suffix('.saved').touch()\n    sys.exit(130)\n"
        "signal.signal(signal.SIGTERM, stop)\nhere.with_suffix('.there').touch()\ntime.sleep(100)\n"
    )
    for name, body in (("scontrol", "echo localhost"), ("srun", 'exec "$@"'),
                       ("torchrun", f'exec {sys.executable} -m torch.distributed.run "$@"')):  # fmt: skip
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
                   "SLURM_NNODES": "1",
                   "SLURM_GPUS_PER_NODE": "2", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "localhost"}  # fmt: skip
    job = subprocess.Popen(["bash", tmp_path / "slurm.sh"], env=environment, stderr=subprocess.DEVNULL)
    try:
        until = time.time() + 120
        while len(list(tmp_path.glob("*.there"))) < 2:
            assert time.time() < until and job.poll() is None
            time.sleep(0.1)
        job.send_signal(signal.SIGTERM)
        job.wait(60)
    finally:
        job.kill()
    assert (len(list(tmp_path.glob("*.saved"))) == 2) == saved


# --- outputs are asked for before the work


def unwritable(folder):
    """Places where nothing can be written, by name."""
    (folder / "file").write_text("mine")
    places = {
        "below a file": folder / "file" / "out",
        "a file": folder / "file",
        "no such file system": "/proc/out",
        "a name too long": folder / ("a" * 300),
        "a path too long": folder.joinpath(*["b" * 200] * 20),
        "not a folder": "/dev/null/x",
    }
    if os.geteuid():
        (folder / "locked").mkdir(mode=0o500)
        places["read-only"] = folder / "locked" / "out"
    return places


@pytest.mark.parametrize("job", ["train", "pretrain", "pretrain into runs"])
def test_an_output_that_cannot_be_written_is_noticed_before_the_work(tmp_path, capsys, monkeypatch, job):
    def work(*_, **__):
        raise AssertionError("the work began")

    monkeypatch.setattr(DreamLLMFamily, "build", work)
    monkeypatch.setattr(pretraining, "pretrain_tokenizer", work)
    monkeypatch.setattr(pretraining, "pretrain_vae", work)
    for name, place in unwritable(tmp_path).items():
        line = {
            "train": ["train", "--steps", "1", "--trackers", "--out", place],
            "pretrain": ["pretrain", "all", "--out", place, "--runs", tmp_path / "runs"],
            "pretrain into runs": ["pretrain", "all", "--out", tmp_path / "parts", "--runs", place],
        }[job]
        assert cli([str(word) for word in line]) == 1, name
        error = capsys.readouterr().err
        assert "cannot be written" in error and error.count("\n") == 1, name
    left = {p.name for p in tmp_path.iterdir()} - {"file", "locked"}
    assert not left and (tmp_path / "file").read_text() == "mine", "and nothing is left behind"


def test_what_lies_deep_in_the_output_is_asked_for_too(tmp_path, capsys, monkeypatch):
    """The last stage's folder is a file; a folder stands where the weights should go; a cache cannot be written."""
    monkeypatch.setattr(DreamLLMFamily, "build", lambda *_, **__: pytest.fail("the work began"))
    name = recipe_of("mini").stages[-1].name
    for blocked, make in ((name, "file"), (f"{name}/trained.safetensors", "folder"), ("trained.safetensors", "folder"),
                          ("training.json", "folder"), ("features", "file")):  # fmt: skip
        out = tmp_path / blocked.replace("/", "-")
        (out / blocked).parent.mkdir(parents=True)
        (out / blocked).mkdir() if make == "folder" else (out / blocked).write_text("")
        assert cli(["train", "--trackers", "--out", str(out)]) == 1
        error = capsys.readouterr().err
        assert f"{blocked}" in error and ("cannot be written" in error or "name a f" in error)
    assert cli(["train", "--trackers", "--cache", "/dev/null/x", "--out", str(tmp_path / "o")]) == 1
    assert "/dev/null/x" in capsys.readouterr().err
    assert cli(["train", "--trackers", "--cache", "/dev/null/x", "--fill-cache"]) == 1
    assert "/dev/null/x" in capsys.readouterr().err


def test_asking_whether_one_can_write_leaves_nothing_behind(tmp_path):
    files.check_output(tmp_path / "a" / "b" / "c.json")
    assert not list(tmp_path.iterdir())
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "c.json").write_text("old")
    files.check_output(tmp_path / "kept" / "c.json")
    assert (tmp_path / "kept" / "c.json").read_text() == "old" and len(list((tmp_path / "kept").iterdir())) == 1


# --- every field is used, or refused

OTHER = {  # another value of each setting that says what is learned
    "seed": 3, "precision": "bf16", "lanes": 8, "mixing": "step", "max_length": 200, "views": 2, "weight_decay": 0.1,
    "betas": (0.8, 0.9), "clip_norm": 0.01,
}  # fmt: skip
NOT_LEARNED = {"strategy", "deepspeed", "micro_batch", "store", "workers", "checkpointing", "compile", "save_every",
               "keep", "log_every", "sample_every", "patience"}  # fmt: skip
OTHER_STAGE = {
    "name": "another", "trains": ("dream_queries",), "learning_rate": 2e-3, "steps": 4, "batch": 4,
    "lm_loss_weight": 0.5, "image_loss_weight": 1.0, "warmup": 0, "ema_decay": 0.1, "read_last": True,
    "timestep_exponent": 0.5,
}  # fmt: skip


def test_the_lists_of_fields_are_whole():
    assert set(OTHER) == set(LEARNED_FROM) and set(OTHER) | NOT_LEARNED == {f.name for f in fields(Settings)}
    assert set(OTHER_STAGE) | {"mixture"} == {f.name for f in fields(Stage)}


@pytest.fixture(scope="module")
def first_run(processor, tmp_path_factory):
    """Three steps of a stage: (folder, rows without times, weights)."""
    folder = tmp_path_factory.mktemp("first")
    return folder, *outcome(processor, stage(2, steps=3), QUICK, folder)


def outcome(processor, what, settings, folder=None):
    """Rows without what is measured, and the weights."""
    model = make_tiny()
    rows = run(model, processor, what, some_corpora(), folder, settings)
    measured = {"seconds", "samples_per_second", "tokens_per_second", "memory_mb"}
    return ([{k: v for k, v in row.items() if k not in measured} for row in rows],
            {name: p.detach().clone() for name, p in model.named_parameters()})  # fmt: skip


CHANGES = [*(("settings", k, v) for k, v in OTHER.items()), *(("stage", k, v) for k, v in OTHER_STAGE.items())]


@pytest.mark.parametrize("where, name, value", CHANGES)
def test_another_value_of_a_field_is_refused_in_the_same_folder(first_run, processor, where, name, value):
    folder, _, _ = first_run
    what, settings = stage(2, steps=3), QUICK
    what, settings = (replace(what, **{name: value}), settings) if where == "stage" else (
        what, replace(settings, **{name: value}))  # fmt: skip
    words = {"name": "stage", "steps": "number of steps", "learning_rate": "learning rate", "trains": "trained parts",
             "lm_loss_weight": "loss weights", "image_loss_weight": "loss weights"}  # fmt: skip
    with pytest.raises(ValueError, match=f"another .*{words.get(name, name)}"):
        run(make_tiny(), processor, what, some_corpora(), folder, settings)


@pytest.mark.parametrize("where, name, value", [c for c in CHANGES if c[1] not in ("name", "views", "max_length")])
def test_each_field_alone_changes_what_is_learned(first_run, processor, where, name, value):
    """`views` needs a store, `max_length` a document that is longer; a stage's name is only a name."""
    _, _, weights = first_run
    what, settings = stage(2, steps=3), QUICK
    if where == "stage":
        what = replace(what, **{name: value})
    else:
        settings = replace(settings, **{name: value})
    _, changed = outcome(processor, what, settings)
    assert any(not torch.equal(weights[k], changed[k]) for k in weights), name


def test_a_document_that_is_longer_than_max_length_is_refused(processor):
    with pytest.raises(ValueError, match="does not fit a row of 20"):
        run(make_tiny(), processor, stage(2), some_corpora(), None, replace(QUICK, max_length=20))


@pytest.mark.parametrize("name, value", [("micro_batch", 2), ("workers", 2), ("checkpointing", True), ("save_every", 1),
                                         ("keep", 1), ("patience", 1), ("sample_every", 1)])  # fmt: skip
def test_the_other_fields_change_no_number_and_resume(first_run, processor, name, value):
    folder, rows, _ = first_run
    settings = replace(QUICK, **{name: value})
    changed, _ = outcome(processor, stage(2, steps=3), settings)
    for a, b in zip(rows, changed, strict=True):
        assert {k: v for k, v in a.items() if k != "precision"} == pytest.approx(
            {k: v for k, v in b.items() if k != "precision"}, abs=1e-5)  # fmt: skip
    assert len(run(make_tiny(), processor, stage(2, steps=3), some_corpora(), folder, settings)) == 3


@pytest.mark.parametrize("field, value, message", [
    ("weight_decay", "1e-2", None), ("clip_norm", "1e0", None), ("lanes", 4.0, None),
    ("betas", ["9e-1", "99e-2"], None),
    ("lanes", 1.5, "lanes=1.5: give a whole number"), ("store", "false", "store='false': give true or false"),
    ("weight_decay", -1, "weight_decay=-1.0: give a number from 0 up"), ("clip_norm", 0, "give a norm above 0"),
    ("betas", [0.9], "two rates"), ("betas", [0.9, 1.0], "two rates"), ("weight_decay", "much", "give a number"),
    ("micro_batch", -1, "micro_batch=-1"), ("workers", -1, "workers=-1"), ("max_length", 0, "max_length=0"),
    ("weight_decay", float("nan"), "weight_decay=nan"), ("precision", "fp16", "use one of auto, bf16, no"),
    ("precision", True, "precision=True"), ("lanes", True, "lanes=True: give a whole number"),
])  # fmt: skip
def test_settings_of_a_recipe_are_numbers_or_refused(tmp_path, field, value, message):
    """YAML reads 1e-2 as a text, and takes any type."""
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"settings": {field: value}, "stages": []}))
    if message:
        with pytest.raises(ValueError, match=message):
            read_recipe(tmp_path / "r.yaml")
    else:
        read = getattr(read_recipe(tmp_path / "r.yaml").settings, field)
        assert read == (tuple(map(float, value)) if field == "betas" else float(value))


@pytest.mark.parametrize("more, message", [
    ({"steps": "1e3"}, None), ({"ema_decay": "9e-1", "image_loss_weight": "1e1"}, None),
    ({"steps": 0}, "at least 1 step"), ({"batch": 1.5}, "batch=1.5"), ({"learning_rate": 0}, "learning_rate above 0"),
    ({"trains": []}, "a list of parts"), ({"trains": "dream_queries"}, "a list of parts"),
    ({"ema_decay": 1}, "ema_decay"),
    ({"read_last": "no way"}, "read_last='no way': give true or false"),
])  # fmt: skip
def test_stages_of_a_recipe_are_usable_or_refused(tmp_path, more, message):
    row = {
        "name": "a",
        "trains": ["dream_queries"],
        "mixture": {"pairs": 1},
        "learning_rate": 1e-3,
        "steps": 1,
        "batch": 8,
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"stages": [{**row, **more}]}))
    if message:
        with pytest.raises(ValueError, match=message):
            read_recipe(tmp_path / "r.yaml")
    else:
        assert all(getattr(read_recipe(tmp_path / "r.yaml").stages[0], k) == float(v) for k, v in more.items())


def test_a_stage_that_would_train_nothing_is_refused(processor):
    with pytest.raises(ValueError, match="trains dream_querys: the model has no such part"):
        run(make_tiny(), processor, replace(stage(2), trains=("dream_querys",)), some_corpora(), None)


def test_entries_of_a_mixture_are_used_or_refused(tmp_path):
    with pytest.raises(ValueError, match="pairs: unknown option 'wieght'"):
        corpora_of(replace(stage(1), mixture={"pairs": {"wieght": 2}}))
    (tmp_path / "a.json").write_text(json.dumps([{"id": "0", "conversations": [
        {"from": "human", "value": "hello"}, {"from": "gpt", "value": "world"}]}]))  # fmt: skip
    entry = {"format": "llava", "shards": "a.json", "images": ".", "documents": 16, "weight": 2}
    (corpus,) = corpora_of(replace(stage(1), mixture={"chat": entry}), tmp_path)
    assert (corpus.documents, corpus.weight) == (16, 2), "of corpora on disk too"


def test_parts_of_another_recipe_are_not_silently_ignored(tmp_path, capsys):
    assert command.main(["--scale", "small", "--parts", str(tmp_path), "--data", str(tmp_path)]) == 1
    assert "--parts is for the recipe mini" in capsys.readouterr().err


def test_another_start_is_refused_before_the_features(tmp_path, capsys, monkeypatch):
    """Cases: other steps, other weights, another rate, other corpora in the same --out."""
    line = ["--stage", "1", "--batch", "8", "--out", str(tmp_path), "--trackers", "--precision", "no"]
    assert command.main([*line, "--steps", "1", "--no-store"]) == 0
    first = (tmp_path / "1-alignment" / "trained.safetensors").read_bytes()
    from dreamllm_edu.models.dreamllm.weights import mini, save_trained

    save_trained(mini(), tmp_path / "other.safetensors")
    recipe = yaml.safe_load((ROOT / "recipes" / "mini.yaml").read_text(encoding="utf8"))
    recipe["stages"][0].update(learning_rate=1e-5)
    (tmp_path / "rate.yaml").write_text(yaml.safe_dump(recipe))
    recipe["stages"][0].update(learning_rate=4e-3, mixture={"pairs": 1.0})
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr(command, "fill_store", lambda *_, **__: pytest.fail("features were computed first"))
    capsys.readouterr()
    for more, word in ((["--steps", "2"], "number of steps"),
                       (["--init", tmp_path / "other.safetensors"], "starting weights"),
                       (["--recipe", tmp_path / "rate.yaml"], "learning rate"),
                       (["--recipe", tmp_path / "data.yaml"], "corpora"),
                       (["--precision", "bf16"], "precision"),
                       (["--weight-decay", "0.5"], "weight_decay")):  # fmt: skip
        steps = [] if more[0] == "--steps" else ["--steps", "1"]
        assert command.main([*line, *steps, *map(str, more)]) == 1
        error = capsys.readouterr().err
        assert f"another {word}" in error and "give a new folder" in error, (more, error)
    assert (tmp_path / "1-alignment" / "trained.safetensors").read_bytes() == first


# --- checkpoints are checked by all


def test_ranks_share_the_checking_and_find_every_damage(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PIECE", 1000)
    save_checkpoint(tmp_path, {"model/w": Strategy().share(torch.arange(3000.0))}, {"step": 1})
    path, read = tmp_path / "step-00000001", []
    real = files.piece_checksum
    monkeypatch.setattr(checkpoint, "piece_checksum", lambda file, number: read.append(number) or real(file, number))
    shares = []
    for rank in range(3):
        read.clear()
        checkpoint.whole_checkpoint(path, rank, 3)
        shares.append(set(read))
    file = path / "rank-00000.safetensors"
    pieces = -(-file.stat().st_size // 1000)
    assert set.union(*shares) == set(range(pieces)) and sum(map(len, shares)) == pieces and min(map(len, shares)) >= 4
    for number in range(pieces):
        whole = file.read_bytes()
        at = min(number * 1000 + 500, len(whole) - 1)
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        refused = []
        for rank in range(3):
            try:
                checkpoint.whole_checkpoint(path, rank, 3)
            except ValueError:
                refused.append(rank)
        assert refused == [number % 3], "one rank finds it, and `last_checkpoint` tells all"
        file.write_bytes(whole)
    assert last_checkpoint(tmp_path)[1]["step"] == 1


# --- speed


def test_flops_are_counted_as_the_planner_counts_them(processor):
    """Model FLOPs are what a step executes without recomputing; the planner walks the real operations."""
    from dreamllm_edu.planning import measure

    model = make_tiny()
    family = DreamLLMFamily(model, processor)
    tokens = 200
    labels = [-100, *range(1, tokens)]
    row = SimpleNamespace(input_ids=[0] * tokens, labels=labels, images=[0], targets=[0])
    for number in (1, 2):
        what = stage(number)
        ours = family.step_flops([SimpleNamespace(row=row, pixels={})], what)
        walked = measure(model.config, what, 1, tokens, 1, precision="fp32", cached=True)["flops"]
        assert ours == pytest.approx(walked, rel=0.08)
        fresh = {"images": [0], "targets": [0]}
        assert family.step_flops([SimpleNamespace(row=row, pixels=fresh)], what) > ours, (
            "encoders run for fresh pictures"
        )
        assert family.step_flops([SimpleNamespace(row=row, pixels={})] * 2, what) == pytest.approx(2 * ours)


@pytest.mark.parametrize("name, tflops", [
    ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100 80GB PCIe", 312), ("NVIDIA A800-SXM4-80GB", 312),
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989), ("NVIDIA GeForce RTX 4090", 165),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA GH200 480GB", None),
    ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
    ("Some GPU of 2031", None),
])  # fmt: skip
def test_a_peak_is_known_or_left_out(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    assert peak_flops("cuda") == (tflops and tflops * 1e12)
    assert peak_flops("cpu") is None and peak_flops("cuda", "no") is None


def test_the_planner_and_the_log_know_the_same_peaks(monkeypatch):
    from dreamllm_edu.planning import PEAK_TFLOPS

    names = {"a100": "NVIDIA A100-SXM4-80GB", "a800": "NVIDIA A800 80GB PCIe", "h100": "NVIDIA H100 80GB HBM3",
             "rtx4090": "NVIDIA GeForce RTX 4090"}  # fmt: skip
    for key, name in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None, name=name: name)
        assert peak_flops("cuda") == PEAK_TFLOPS[key] * 1e12


def test_the_log_has_mfu_where_a_peak_is_known_and_nowhere_else(processor, tmp_path, monkeypatch):
    from dreamllm_edu.training import trainer

    rows = run(make_tiny(), processor, stage(2, steps=1), some_corpora(), tmp_path / "cpu")
    assert "mfu" not in rows[0] and rows[0]["tokens_per_second"] > 0
    monkeypatch.setattr(trainer, "peak_flops", lambda device, precision: 1e12)
    rows = run(make_tiny(), processor, stage(2, steps=2), some_corpora(), tmp_path / "gpu")
    assert all(0 < row["mfu"] < 1 for row in rows)
    documents = {"documents": 2, "tokens": 10, "skipped": 0, "flops": 3e12, "peak": 1e13}
    assert speed(documents, 2.0)["mfu"] == pytest.approx(0.15)
