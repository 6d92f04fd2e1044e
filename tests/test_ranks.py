"""Two and four processes over gloo: FSDP2 = DDP = one process, for every stage; checkpoints of two are read by one
and by four; a rank that dies."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_train import curve

from dreamllm_edu.training.checkpoint import last_checkpoint
from dreamllm_edu.training.report import read_log

from ranks import ranks_without_pictures, stage_two, train_all

HERE = Path(__file__).parent
COLUMNS = ("step", "lr", "lm", "image", "norm", "lm/texts", "image/articles")


def launch(world, folder, *jobs):
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(HERE.parent),
    }
    line = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(world),
        str(HERE / "ranks.py"),
        str(folder),
        *jobs,
    ]
    return subprocess.run(line, capture_output=True, text=True, timeout=900, env=environment)


def without_the_end(source, target):
    """A copy of a run as it stood after its first checkpoint."""
    shutil.copytree(source, target)
    shutil.rmtree(target / "step-00000005")
    return target


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All short trainings, once: alone, by two (DDP, FSDP2) and by four (FSDP2, and resumed from two)."""
    folder = tmp_path_factory.mktemp("ranks")
    train_all(folder, "single")
    two = launch(2, folder, "ddp", "fsdp2", "samples", "bf16", "nan")
    assert two.returncode == 0, two.stderr[-3000:]
    without_the_end(folder / "fsdp2-2-stage2", folder / "by-four")
    without_the_end(folder / "fsdp2-2-stage2", folder / "by-one")
    without_the_end(folder / "single-1-stage2", folder / "from-one")
    four = launch(4, folder, "fsdp2", "resume:by-four", "resume:from-one")
    assert four.returncode == 0, four.stderr[-3000:]
    stage_two(folder / "by-one", "single")
    return folder


@pytest.fixture(scope="module")
def zero3(runs):
    """The same trainings by DeepSpeed, once, on two processes; its checkpoint read by others, and theirs by it."""
    without_the_end(runs / "fsdp2-2-stage2", runs / "zero3-from-fsdp2")
    two = launch(
        2, runs, "zero3", "zero3-resume:zero3-from-fsdp2", "zero3-samples", "zero3-bf16", "zero3-micro", "zero3-nan"
    )
    assert two.returncode == 0, two.stderr[-3000:]
    without_the_end(runs / "zero3-2-stage2", runs / "zero3-by-one")
    without_the_end(runs / "zero3-2-stage2", runs / "zero3-by-four")
    four = launch(4, runs, "resume:zero3-by-four")
    assert four.returncode == 0, four.stderr[-3000:]
    stage_two(runs / "zero3-by-one", "single")
    return runs


def same(folder, one, other, tolerance=1e-5):
    """The largest difference of two curves; asserts that curves and weights agree."""
    a, b = curve(folder / one, COLUMNS), curve(folder / other, COLUMNS)
    assert len(a) == len(b) == 5
    apart = 0.0
    for x, y in zip(a, b):
        assert [v is None for v in x.values()] == [v is None for v in y.values()]
        apart = max(apart, *(abs(x[k] - y[k]) for k in x if x[k] is not None))
    x, y = (load_file(folder / name / "weights.safetensors") for name in (one, other))
    assert x.keys() == y.keys()
    weights = max((x[k] - y[k]).abs().max().item() for k in x)
    print(f"{one} = {other}: curves differ by {apart:.1e}, weights by {weights:.1e}")
    assert apart < tolerance and weights < tolerance
    return apart


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("way", ["ddp-2", "fsdp2-2", "fsdp2-4"])
def test_sharing_the_work_changes_no_loss_and_no_weight(runs, way, number):
    same(runs, f"single-1-stage{number}", f"{way}-stage{number}")


@pytest.mark.parametrize("number", [1, 2, 3])
def test_deepspeed_changes_no_loss_and_no_weight(zero3, number):
    same(zero3, f"single-1-stage{number}", f"zero3-2-stage{number}")


def test_weights_moved_at_all(runs):
    from conftest import make_tiny

    before = dict(make_tiny().named_parameters())
    after = load_file(runs / "fsdp2-4-stage2" / "weights.safetensors")
    assert max((after[k] - before[k]).abs().max().item() for k in after) > 1e-3


def test_some_ranks_had_no_picture():
    assert ranks_without_pictures(4) >= 2 and ranks_without_pictures(2) >= 1


@pytest.mark.parametrize("there", ["by-one", "by-four", "from-one"])
def test_a_checkpoint_is_read_by_any_number_of_ranks(runs, there):
    same(runs, "fsdp2-2-stage2", there)


@pytest.mark.parametrize("there", ["zero3-by-one", "zero3-by-four", "zero3-from-fsdp2"])
def test_deepspeed_and_others_read_each_others_checkpoints(zero3, there):
    same(zero3, "zero3-2-stage2", there)


def test_deepspeed_counts_micro_batches_and_recomputes(zero3):
    same(zero3, "zero3-2-stage2", "zero3-micro")


def test_deepspeed_shares_what_trains(zero3):
    """That it leaves the frozen parts whole, `stage_two` asks in every process."""
    files = sorted((zero3 / "zero3-2-stage2" / "step-00000005").glob("rank-*"))
    whole = (zero3 / "single-1-stage2" / "step-00000005" / "rank-00000.safetensors").stat().st_size
    assert len(files) == 2 and max(f.stat().st_size for f in files) < 0.6 * whole


def test_a_bad_step_of_one_rank_is_skipped_by_all(zero3):
    same(zero3, "nan", "zero3-nan")
    for there in ("nan", "zero3-nan"):
        assert [row["norm"] == row["norm"] for row in curve(zero3 / there)] == [True, False, True, True, True]
        assert len(list((zero3 / there).glob("bad-step-00000001-*"))) == 2


def test_sharded_files_hold_shares(runs):
    files = sorted((runs / "fsdp2-4-stage2" / "step-00000005").glob("rank-*"))
    whole = (runs / "single-1-stage2" / "step-00000005" / "rank-00000.safetensors").stat().st_size
    assert len(files) == 4 and max(f.stat().st_size for f in files) < 0.4 * whole


def test_gathered_weights_are_a_normal_checkpoint(runs):
    from dreamllm_edu.models.dreamllm.weights import load_trained

    from conftest import make_tiny

    model = load_trained(make_tiny(seed=3), runs / "fsdp2-4.safetensors")
    found = load_file(runs / "fsdp2-4-stage3" / "weights.safetensors")
    torch.testing.assert_close(model.dream_queries.weight, found["dream_queries.weight"], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("way, there", [("fsdp2", "samples"), ("zero3", "zero3-samples")])
def test_sampling_with_sharded_weights_changes_nothing(zero3, way, there):
    from dreamllm_edu.documents.formats import read_jsonl

    assert curve(zero3 / there) == curve(zero3 / f"{way}-2-stage2")
    assert read_jsonl(zero3 / there / "samples-00000004.jsonl")[0].parts[0].startswith("a red apple")


@pytest.mark.parametrize("way, there", [("fsdp2", "bf16"), ("zero3", "zero3-bf16")])
def test_bfloat16_stays_near_float32(zero3, way, there):
    pairs = zip(curve(zero3 / there), curve(zero3 / f"{way}-2-stage2"), strict=True)
    apart = [abs(a[key] - b[key]) for a, b in pairs for key in ("lm", "image") if a[key] is not None]
    assert 0 < max(apart) < 0.05


def test_a_rank_that_dies_ends_the_run_and_leaves_the_last_checkpoint(tmp_path):
    ended = launch(2, tmp_path, "die")
    assert ended.returncode != 0
    assert last_checkpoint(tmp_path / "dead")[1]["step"] == 3
    assert [row["step"] for row in read_log(tmp_path / "dead" / "log.jsonl")][:4] == [0, 1, 2, 3]


def test_ranks_share_the_checking_of_a_checkpoint(tmp_path):
    """Of a file that rank 0 wrote alone, too; damage that rank 1 finds is damage for both."""
    assert (ended := launch(2, tmp_path, "pieces:one")).returncode == 0, ended.stderr[-3000:]
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    file = tmp_path / "two" / "step-00000005" / "rank-00000.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[20_000 + 7] ^= 1  # in the second piece
    file.write_bytes(damaged)
    assert (ended := launch(2, tmp_path, "check:one", "check:two")).returncode == 0, ended.stderr[-3000:]
    read = lambda run: [json.loads((tmp_path / run / f"read-by-{rank}.json").read_text()) for rank in (0, 1)]
    (first, *there), (second, *same_there) = read("one")
    pieces = -(-file.stat().st_size // 20_000)
    assert len(first) + len(second) == pieces == len({*first, *second}) and abs(len(first) - len(second)) <= 1
    assert there == same_there and there[0] == "step-00000005"
    (first, *there), (second, *same_there) = read("two")
    assert there == same_there and there[0] == "step-00000003"
    assert sum("cut off or changed" in word for word in first) == 1 and not any("changed" in word for word in second)


@pytest.mark.parametrize("asked", ["FSDP", "DEEPSPEED"])
def test_the_launcher_chooses_how_to_share(tmp_path, asked):
    """What `accelerate launch` does with a configuration file: it starts processes and says in their environment what
    was asked for."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(HERE.parent),
        f"ACCELERATE_USE_{asked}": "true",
    }
    line = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "dreamllm_edu.train",
        "--scale",
        "mini",
        "--stage",
        "1",
        "--steps",
        "2",
        "--batch",
        "4",
        "--lanes",
        "4",
        "--precision",
        "no",
        "--no-store",
        "--out",
        str(tmp_path),
    ]
    ended = subprocess.run(line, capture_output=True, text=True, timeout=600, env=environment, cwd=HERE.parent)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert [row["step"] for row in read_log(tmp_path / "1-alignment" / "log.jsonl")] == [0, 1]
    assert len(list((tmp_path / "1-alignment" / "step-00000002").glob("rank-*"))) == 2, "shares, not copies"
    assert (tmp_path / "1-alignment" / "trained.safetensors").exists()
