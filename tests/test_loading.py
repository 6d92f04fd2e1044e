"""Weights that stay in their files until a process asks for its rows: the same numbers as a model that is built whole,
in every way of sharing, and no process ever holds all of it."""

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_train import ALIGN, public_parts
from test_train import stage as stage_of
from transformers import LlamaForCausalLM

from dreamllm_edu.models.dreamllm.family import DreamLLMFamily
from dreamllm_edu.models.dreamllm.weights import save_trained
from dreamllm_edu.parts.language import llama_config
from dreamllm_edu.parts.loading import weights_checksum
from dreamllm_edu.planning import loading_bytes
from dreamllm_edu.training.stage import Settings, set_trainable
from dreamllm_edu.training.strategies import strategy_of

from conftest import make_tiny

HERE = Path(__file__).resolve().parent
CPU = torch.device("cpu")


def parts_of(folder, tied, dtype=torch.float16, **sizes):
    """Public parts whose language model lies on disk in half precision, with seven tokens less than it will need."""
    vocabulary, parts = public_parts(folder)
    sizes = {"hidden": 32, "layers": 2, "heads": 2, "ffn": 64, "context": 256, **sizes}
    torch.manual_seed(1)
    config = llama_config(vocab_size=vocabulary, **sizes)
    config.tie_word_embeddings = tied
    language = LlamaForCausalLM(config)
    language.to(dtype).save_pretrained(folder / "language")
    return {**parts, "num_queries": 3}  # an odd number of rows


def built(scale, parts, device=None, seed=5):
    """A family, and the next random number after it was built."""
    torch.manual_seed(seed)
    return DreamLLMFamily.build(scale, parts, 256, device=device), torch.rand(3)


def ready(family, strategy="single", trains=ALIGN + ("language_model",)):
    """The family's model as a strategy shares it out."""
    set_trainable(family.model, replace(stage_of(2), trains=trains))
    way = strategy_of(Settings(strategy=strategy), family.decoder_layers(), family.frozen_parts, family.unread)
    way.wrap(family.model)
    return way


def all_tensors(model):
    """Parameters and buffers, those that are not saved too."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}


def assert_equal(model, whole, gather=lambda tensor: tensor):
    mine, others = all_tensors(model), all_tensors(whole)
    assert mine.keys() == others.keys() and any("inv_freq" in name for name in mine)
    for name, tensor in others.items():
        value = gather(mine[name])
        assert value.dtype == tensor.dtype and value.device == tensor.device and torch.equal(value, tensor), name
        assert mine[name].requires_grad == tensor.requires_grad, name


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_read_from_files_is_the_one_that_is_built_whole(tmp_path, tied):
    parts = parts_of(tmp_path, tied)
    (whole, after), (family, later) = built("small", parts), built("small", parts, CPU)
    assert torch.equal(after, later), "the caller's random numbers must go on as before"
    held = {name.split(".")[0] for name, p in family.model.named_parameters() if p.is_meta}
    assert held == {"language_model"}, "only the language model is still in its files"
    assert family.model.config.to_dict() == whole.model.config.to_dict()
    assert family.frozen_checksum() == whole.frozen_checksum()
    way = ready(family)
    set_trainable(whole.model, replace(stage_of(2), trains=ALIGN + ("language_model",)))
    assert_equal(family.model, whole.model)
    language = family.model.language_model
    assert (language.lm_head.weight is language.model.embed_tokens.weight) == tied
    assert way.checksum() == weights_checksum(whole.model) and not family.model.training
    assert family.model.scheduler.config == whole.model.scheduler.config


def test_the_miniature_too():
    (whole, after), (family, later) = built("mini", None), built("mini", None, CPU)
    assert torch.equal(after, later) and family.model.config.to_dict() == whole.model.config.to_dict()
    ready(family), set_trainable(whole.model, replace(stage_of(2), trains=ALIGN + ("language_model",)))
    assert_equal(family.model, whole.model)


@pytest.mark.parametrize("tied", [True, False])
def test_trained_weights_take_the_place_of_the_parts(tmp_path, tied):
    parts = parts_of(tmp_path / "parts", tied)
    trained, _ = built("small", parts, seed=8)
    with torch.no_grad():
        for name, p in trained.model.named_parameters():
            if name.split(".")[0] not in trained.frozen_parts:
                p.add_(0.25)
    save_trained(trained.model, tmp_path / "trained.safetensors")
    (whole, _), (family, _) = built("small", parts), built("small", parts, CPU)
    for each in (whole, family):
        each.load(tmp_path / "trained.safetensors")
    way = ready(family)
    set_trainable(whole.model, replace(stage_of(2), trains=ALIGN + ("language_model",)))
    assert_equal(family.model, whole.model)
    assert way.checksum() == weights_checksum(whole.model)
    other = parts_of(tmp_path / "other", tied)
    with torch.random.fork_rng():
        torch.manual_seed(77)
        make_tiny(3).vae.save_pretrained(tmp_path / "other" / "diffusion" / "vae")
    with pytest.raises(ValueError, match="trained on other parts"):
        built("small", other, CPU)[0].load(tmp_path / "trained.safetensors")
    more, _ = built("small", {**parts, "num_queries": 5}, CPU)
    with pytest.raises(ValueError, match="dream_queries.weight"):
        more.load(tmp_path / "trained.safetensors")


def test_frozen_parts_arrive_in_the_dtype_in_which_they_compute(tmp_path):
    """On a device that is not the CPU, with precision bf16 (meta stands for a GPU here)."""
    family = DreamLLMFamily.build("small", parts_of(tmp_path, True), 256, device="meta", precision="bf16")
    for name in family.frozen_parts:
        part = getattr(family.model, name)
        assert {(p.dtype, p.device.type) for p in part.parameters()} == {(torch.bfloat16, "meta")}
        assert {b.device.type for b in part.buffers()} <= {"meta"}
    whole, _ = built("small", paths(tmp_path))
    assert family.frozen_checksum() == whole.frozen_checksum(), "taken in float32, before they were rounded"


def paths(folder):
    return {**{name: str(folder / name) for name in ("language", "vision", "diffusion")}, "num_queries": 3}


SIZES = {"hidden": 256, "layers": 24, "heads": 4, "ffn": 1024}  # 25 million parameters, 100 MB


def launch(folder, *jobs, world=2):
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "MALLOC_MMAP_THRESHOLD_": "65536",  # freed memory goes back at once
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}",
    }
    line = [sys.executable, "-c", "import sys, test_loading; test_loading.one_rank(*sys.argv[1:])"]
    ranks = [
        subprocess.Popen(
            [*line, str(folder), str(rank), str(world), *jobs],
            env={**environment, "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
        )
        for rank in range(world)
    ]
    errors = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert not any(rank.returncode for rank in ranks), errors
    return [json.loads((folder / f"{'-'.join(jobs)}-{rank}.json").read_text()) for rank in range(world)]


class Peak(threading.Thread):
    """The most memory that the process allocated while this ran, in bytes more than before; pages of mapped files,
    which the system takes back when it needs them, do not count."""

    def __enter__(self):
        self.before, self.most, self.ended = allocated(), 0, threading.Event()
        self.start()
        return self

    def run(self):
        while not self.ended.wait(0.002):
            self.most = max(self.most, allocated() - self.before)

    def __exit__(self, *_):
        self.ended.set()
        self.join()


def allocated():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))


def one_rank(folder, rank, world, strategy, how):
    """What each process runs: the model from files, or built whole as a control; compared with the whole one after."""
    folder, rank = Path(folder), int(rank)
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet-{strategy}-{how}", rank=rank, world_size=int(world)
    )
    parts = paths(folder)
    built("mini", None, CPU)  # libraries load what they load at first use
    with Peak() as peak:
        family, _ = built("small", parts, CPU if how == "files" else None)
        way = ready(family, strategy)
    whole, _ = built("small", parts)
    set_trainable(whole.model, replace(stage_of(2), trains=ALIGN + ("language_model",)))
    if how == "files":
        assert_equal(family.model, whole.model, way.gather)
        assert way.checksum() == weights_checksum(whole.model)
    own = sum(p.numel() for name, p in whole.model.named_parameters() if name.split(".")[0] not in whole.frozen_parts)
    planned = loading_bytes(whole.model.config, int(world), frozen_dtype=torch.float32, rank=rank)
    found = {"peak": peak.most, "whole": 4 * own, "planned": [planned["GPU"], sum(planned.values())]}
    (folder / f"{strategy}-{how}-{rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    os._exit(0)


def test_two_processes_that_hold_everything_read_the_same_numbers(tmp_path):
    parts_of(tmp_path, False)
    launch(tmp_path, "ddp", "files")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
def test_no_rank_ever_holds_the_whole_model(tmp_path, strategy):
    """Over gloo: all numbers are right on every rank, and a rank allocates its share and a few tensors. The control
    builds the model whole, as it was done before."""
    if strategy == "zero3":
        pytest.importorskip("deepspeed")
    parts_of(tmp_path, True, **SIZES)
    for how, least, most in (("whole", 1.0, 9.9), ("files", 0.4, 0.8)):
        for rank, found in enumerate(launch(tmp_path, strategy, how)):
            part = found["peak"] / found["whole"]
            print(f"{strategy}, {how}, rank {rank}: {found['peak'] / 1e6:.0f} MB, {part:.2f} of the whole model")
            assert least < part < most
            if strategy == "fsdp2" and how == "files":  # GPU and host are the same memory here
                assert 0.9 * found["planned"][0] < found["peak"] < 1.1 * found["planned"][1]
