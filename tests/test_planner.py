"""What the planner predicts against what is there: bytes of real tensors, shards of two processes, a real peak of
memory, a step of full size."""

import json
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dreamllm_edu.models.dreamllm.model import DreamLLM
from dreamllm_edu.models.dreamllm.official import parameters_of
from dreamllm_edu.models.dreamllm.weights import mini
from dreamllm_edu.planning import (
    FROZEN,
    NOT_PLANNED,
    LiveBytes,
    SavedBytes,
    cache_bytes,
    dry_run,
    find_stage,
    gathered_bytes,
    loading_bytes,
    measure,
    picture_batch,
    plan,
    rows_of,
    scale_config,
    stages_of,
    state_bytes,
    token_batch,
    weights_of,
)
from dreamllm_edu.training.recipe import Recipe, recipe_of
from dreamllm_edu.training.stage import Settings, Stage, set_trainable
from dreamllm_edu.training.strategies import strategy_of
from dreamllm_edu.training.trainer import Trainer

from conftest import make_tiny

HERE = Path(__file__).resolve().parent
STAGE_NUMBERS = (1, 2, 3)
MINI, PAPER = recipe_of("mini").stages, recipe_of("paper").stages


def real_batch(config, micro_batch=1, length=None):
    """What the planner measures with, with numbers in it; pictures as features."""
    drawn = {
        name: torch.randn(t.shape) for name, t in picture_batch(config, micro_batch, torch.float32, cached=True).items()
    }
    return {**token_batch(config, micro_batch, length), **drawn, "timesteps": torch.full((micro_batch,), 500),
            "condition_drop_mask": torch.zeros(micro_batch, dtype=torch.bool), "compact_logits": True}


def one_step(model, stage, length=40):
    """A real training step; (optimizer, gradients are still there)."""
    set_trainable(model, stage)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()
    model(**real_batch(model.config, length=length)).loss.backward()
    optimizer.step()
    return optimizer


def states_of(model, optimizer):
    """Bytes of real tensors, by the planner's items; of sharded ones this process's part."""
    local = lambda t: t.to_local() if hasattr(t, "to_local") else t
    size = lambda tensors: sum(local(t).numel() * local(t).element_size() for t in tensors)
    frozen = [p for name, p in model.named_parameters() if name.split(".")[0] in FROZEN]
    return {
        "weights": size(p for name, p in model.named_parameters() if name.split(".")[0] not in FROZEN),
        "gradients": size(p.grad for p in model.parameters() if p.grad is not None),
        "AdamW": size(t for state in optimizer.state.values() for t in state.values()),
        "frozen parts": size(frozen),
    }


class NoTask:
    """Enough of a task to make a trainer that never takes a step."""
    name, run, keys = "nothing", {}, None


@pytest.mark.parametrize("number", STAGE_NUMBERS)
def test_state_bytes_are_those_of_real_tensors(number):
    model, stage = make_tiny(), MINI[number - 1]
    found = states_of(model, one_step(model, stage))
    predicted = state_bytes(model.config, stage, parallel="single", frozen_dtype=torch.float32)
    assert found == {item: predicted[item] for item in found}
    trainer = Trainer(model, NoTask(), 1, 1e-3, ema_decay=stage.ema_decay)
    trainer.start()
    assert predicted["moving average"] == sum(t.nbytes for t in trainer.ema.values()), (
        "the average of what trains, as the trainer keeps it"
    )
    held = sum(t.nbytes for state in trainer.optimizer.state.values() for t in state.values())
    assert predicted["AdamW"] == held, "the optimizer's moments, as the trainer makes them"


def test_sharded_bytes_are_those_of_two_processes(tmp_path):
    """`fully_shard` itself, over gloo, with layers of odd sizes: both ranks, stages I and II."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}"}
    line = [sys.executable, "-c", "import sys, test_planner; test_planner.shard(*sys.argv[1:])"]
    ranks = [
        subprocess.Popen([*line, str(tmp_path), str(rank)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    errors = [rank.communicate(timeout=150)[1] for rank in ranks]
    assert not any(rank.returncode for rank in ranks), errors
    for number in (1, 2):
        both = [json.loads((tmp_path / f"{number}-{rank}.json").read_text()) for rank in (0, 1)]
        for rank, found in enumerate(both):
            predicted = state_bytes(odd().config, MINI[number - 1], 2, frozen_dtype=torch.float32, rank=rank)
            assert found == {item: predicted[item] for item in found}, f"rank {rank}"
        assert both[0] != both[1], "with odd sizes the ranks differ, or this tests nothing"


def odd():
    """A tiny model with three queries: a first dimension that two processes cannot share evenly."""
    config = make_tiny().config
    config.num_queries = 3
    return DreamLLM(config)


def shard(folder, rank):
    """What each of the two processes runs."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=int(rank), world_size=2)
    for number in (1, 2):
        model, stage = odd(), MINI[number - 1]
        set_trainable(model, stage)
        layers = list(model.language_model.model.layers)
        strategy_of(Settings(strategy="fsdp2"), layers, model.frozen_parts).wrap(model)
        (Path(folder) / f"{number}-{rank}.json").write_text(json.dumps(states_of(model, one_step(model, stage))))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("rows, world", [(10, 4), (9, 4), (3, 8), (8, 2), (1, 1)])
def test_rows_are_those_of_torch_chunk(rows, world):
    pieces = [len(piece) for piece in torch.zeros(rows, 2).chunk(world)]
    assert [rows_of(rows, world, rank) for rank in range(world)] == pieces + [0] * (world - len(pieces))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_fake_activations_are_the_real_ones(checkpointing):
    """The same counters on real tensors: every byte that is saved and every byte at the peak."""
    model, stage = make_tiny(), MINI[1]
    predicted = measure(model.config, stage, 2, 64, precision="fp32", cached=True, checkpointing=checkpointing)
    set_trainable(model, stage)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.unet.enable_gradient_checkpointing()
    model.train()
    batch = real_batch(model.config, 2, 64)
    known = [
        t.untyped_storage()._cdata
        for t in [*model.parameters(), *model.buffers(), *batch.values()]
        if torch.is_tensor(t)
    ]
    live, saved = LiveBytes(known), SavedBytes(known)
    for p in model.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p: live.drop(p.grad.untyped_storage()._cdata))
    with live:
        with saved:
            loss = model(**batch).loss
        loss.backward()
    assert saved.total == pytest.approx(predicted["saved"], rel=0.02)
    assert live.peak == pytest.approx(predicted["peak"], rel=0.02)


PEAK = """
import json, sys
import torch
import test_planner
from dreamllm_edu.models.dreamllm.model import DreamLLM
from dreamllm_edu.planning import scale_config, stages_of
from dreamllm_edu.training.stage import set_trainable

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

torch.set_num_threads(1)
baseline, checkpointing = status("VmRSS"), sys.argv[1] == "True"
model, stage = DreamLLM(scale_config("mini")), stages_of("mini")[1]
set_trainable(model, stage)
if checkpointing:
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.unet.enable_gradient_checkpointing()
model.train()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
peaks = []
small, large = map(int, sys.argv[2:])
for micro_batch in (small, small, large):  # gradients stay, as they do while batches are accumulated
    model(**test_planner.real_batch(model.config, micro_batch)).loss.backward()
    optimizer.step()
    peaks.append(status("VmHWM"))
print(json.dumps([baseline, *peaks[1:]]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("checkpointing, batches", [(False, (2, 8)), (True, (4, 16))])
def test_peak_memory_of_a_real_step(checkpointing, batches):
    """The operating system's own number for a step of the miniature, in a process of its own, within 10 % of the
    prediction.

    Measured: the process before the model exists, and what the libraries need beside it (with a smaller step).
    Predicted: states and activations.
    The allocator is told to give memory back at once (MALLOC_MMAP_THRESHOLD_), so that the peak is the model's and not
    its habits'."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}",
    }
    line = [sys.executable, "-c", PEAK, str(checkpointing), *map(str, batches)]
    found = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=170)
    assert found.returncode == 0, found.stderr[-2000:]
    baseline, small, large = json.loads(found.stdout)
    config, stage = scale_config("mini"), stages_of("mini")[1]
    states = sum(
        state_bytes(config, replace(stage, ema_decay=0.0), parallel="single", frozen_dtype=torch.float32).values()
    )
    activations = [
        measure(config, stage, b, precision="fp32", cached=True, checkpointing=checkpointing)["peak"] for b in batches
    ]
    libraries = small - baseline - states - activations[0]
    predicted = baseline + states + activations[1] + libraries
    print(
        f"measured {large / 1e6:.0f} MB, predicted {predicted / 1e6:.0f}; activations "
        f"{activations[1] / 1e6:.0f} of it, libraries "
        f"{libraries / 1e6:.0f}; growth {(large - small) / 1e6:.0f}, predicted "
        f"{(activations[1] - activations[0]) / 1e6:.0f}"
    )
    assert abs(libraries) < 0.2 * small, "what is not explained must be small"
    assert large == pytest.approx(predicted, rel=0.1)
    assert large - small == pytest.approx(activations[1] - activations[0], rel=0.1), (
        "also without the baseline, which flatters"
    )


def peak_memory():
    """The most memory this process ever had, in bytes; 0 where the system does not say."""
    status = Path("/proc/self/status")
    return (
        next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        if status.exists()
        else 0
    )


def test_dry_run_of_the_paper():
    """A full-size step: exactly the stage's gradients, the paper's shapes, and no memory."""
    parts, trainable = parameters_of(scale_config("paper"), PAPER)
    before = peak_memory()
    for number in (1, 2):
        report = dry_run("paper", number)
        assert report["wrong"] == [] and report["with_gradient"] == report["trained"] == trainable[report["stage"]]
    assert report["parameters"] == sum(parts.values()) and report["seconds"] < 120
    assert report["shapes"]["conditions"] == (1, 64, 1024) and report["shapes"]["latents"] == (1, 4, 64, 64)
    labelled = (token_batch(scale_config("paper"))["labels"][:, 1:] != -100).sum().item()
    assert report["shapes"]["logits"] == (labelled, 32008) and report["shapes"]["last_hidden_state"] == (1, 2048, 4096)
    assert peak_memory() - before < 5e8, "16 GB of weights must not be there"


def test_the_dry_run_names_missing_gradients():
    """A stage that wants to train the VAE: no gradient reaches it, and the report must say so; the language model alone
    is in order."""
    report = dry_run("mini", replace(find_stage("mini", 2), trains=("language_model", "vae")))
    assert report["wrong"] and all(name.startswith("vae.") for name in report["wrong"])
    report = dry_run("mini", replace(find_stage("mini", 2), trains=("language_model",)))
    assert report["wrong"] == [] and report["trained"] == sum(
        w.numel() for w in weights_of(scale_config("mini")) if w.part == "language_model"
    )


def test_scales():
    read, shipped = scale_config("mini").to_dict(), mini(trained=False).config.to_dict()
    for part in ("text_config", "vision_config"):
        read[part].pop("_name_or_path"), shipped[part].pop("_name_or_path")  # where the files lie
    assert read == shipped, "the shipped model's own configuration"
    small = {}
    for w in weights_of(scale_config("small")):
        small[w.part] = small.get(w.part, 0) + w.numel()
    assert small["language_model"] - 8 * 960 == 361_821_120, "SmolLM2-360M's own count, and eight rows more"
    assert small["unet"] == 859_520_964 and small["vae"] == 83_653_863, "Stable Diffusion 1.5's own counts"
    assert small["vision_encoder"] == 85_799_424, "CLIP-B/16's vision tower"
    with pytest.raises(ValueError, match="mini, small, paper"):
        scale_config("large")


def test_stages_add_up():
    config = scale_config("paper")
    first, second = (state_bytes(config, stage, 8) for stage in PAPER[:2])
    assert first["weights"] == second["weights"] and first["frozen parts"] == second["frozen parts"]
    assert first["gradients"] < 0.01 * second["gradients"] and first["moving average"] == 0
    alone = sum(w.numel() for w in weights_of(config) if w.part not in FROZEN) * 4
    assert sum(state_bytes(config, PAPER[1], 8, rank=rank)["gradients"] for rank in range(8)) == alone
    assert state_bytes(config, PAPER[1], 8, "ddp")["gradients"] == alone


def test_gathered_layers():
    config, stage = scale_config("paper"), PAPER[1]
    layer = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096  # Llama-7B's decoder layer, by hand
    root = 2 * 32008 * 4096 + 4096 + 64 * 4096 + 1024 * 4096 + 4096 + 4096 * 1024
    assert gathered_bytes(config, stage, 8) == {
        "weights in use": 2 * (root + 2 * layer),
        "gradients on their way": 2 * (root + layer) + 4 * layer,
    }
    assert gathered_bytes(config, stage, 1, "single", torch.float32)["weights in use"] == 0


def test_flops_by_hand():
    config, stage = scale_config("mini"), stages_of("mini")[1]
    text, tokens = config.text_config, 256
    n = sum(w.numel() for w in weights_of(config) if ".layers." in w.name and "language_model" in w.name)
    one, two = (measure(config, stage, b, tokens, precision="fp32", cached=True) for b in (1, 2))
    labelled = (token_batch(config, 1, tokens)["labels"][:, 1:] != -100).sum().item()
    by_hand = (
        2 * n * tokens
        + 4 * tokens**2 * text.hidden_size * text.num_hidden_layers
        + 2 * labelled * text.hidden_size * text.vocab_size
    )
    model = DreamLLM(config).eval()
    batch = real_batch(config, 1, tokens)
    with torch.no_grad(), FlopCounterMode(display=False) as unet:
        width = config.unet_config["cross_attention_dim"]
        model.unet(
            batch["latents"], batch["timesteps"], encoder_hidden_states=torch.zeros(1, config.num_queries, width)
        )
    projected = (
        2 * text.hidden_size * (config.num_patches * config.vision_config.hidden_size + config.num_queries * width)
    )
    assert one["forward_flops"] == pytest.approx(by_hand + unet.get_total_flops() + projected, rel=0.001)
    assert two["flops"] == pytest.approx(2 * one["flops"], rel=1e-6)


def test_plan():
    found = plan("mini", gpus=2, gpu_memory=4, precision="fp32", device=10, cached=True)
    text = str(found)
    assert found.fits and all(stage.name in text for stage in found.stages) and "not measured" in text
    for stage, planned in zip(MINI, found.stages):
        assert planned.micro_batch * planned.accumulation * 2 == stage.batch and planned.micro_batch <= planned.largest
        assert planned.hours * 3600 * planned.samples_per_second == pytest.approx(stage.steps * stage.batch)
        assert planned.samples_per_second * planned.flops == pytest.approx(2 * 10e12 * 0.4)
        assert planned.total + planned.headroom == pytest.approx(3.6e9)
    assert (
        found.cache_bytes
        == cache_bytes(scale_config("mini"))
        == {"CLIP features": 16 * 192 * 2, "VAE latents": 2 * 8 * 8 * 8 * 2}
    )
    at = lambda n: plan("mini", 2, 2, 4, micro_batch=n, precision="fp32", device=10, cached=True)
    largest = found.stages[1].largest
    assert at(largest).fits and not at(largest + 1).fits, "the largest micro batch is the largest"
    tight = plan("mini", 2, 1, 0.05, precision="fp32", device=10, cached=True)
    assert not tight.fits and tight.stages[0].largest == 0 and "no" in tight.table()


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"scale": "huge"}, "scale='huge'"),
        ({"stage": 6}, "stage=6"),
        ({"stage": "first"}, "1-alignment"),
        ({"gpus": 0}, "gpus=0"),
        ({"gpu_memory": 0}, "gpu_memory=0"),
        ({"micro_batch": 0}, "micro_batch=0"),
        ({"precision": "fp8"}, "fp8"),
        ({"device": "tpu"}, "a100"),
        ({"parallel": "single"}, "one GPU"),
        ({"parallel": "tensor"}, "fsdp2"),
        ({"utilisation": 0}, "utilisation=0"),
        ({"reserve": 1}, "reserve=1"),
        ({"length": 10}, "length=10"),
        ({"length": 5000}, "length=5000"),
        ({"pictures": 0}, "pictures=0"),
        ({"device": -1}, "device=-1"),
    ],
)
def test_what_cannot_be_planned(wrong, message):
    with pytest.raises(ValueError, match=message):
        plan(**{"scale": "mini", "gpus": 2, **wrong})


OTHER_SETTINGS = {
    "strategy": "ddp",
    "deepspeed": "recipes/zero3.json",
    "precision": "no",
    "lanes": 3,
    "mixing": "document",
    "micro_batch": 4,
    "max_length": 256,
    "store": False,
    "views": 3,
    "workers": 2,
    "checkpointing": True,
    "compile": True,
    "save_every": 7,
    "keep": 9,
    "log_every": 3,
    "sample_every": 5,
    "patience": 1,
    "weight_decay": 0.5,
    "betas": (0.5, 0.5),
    "clip_norm": 2.0,
    "seed": 4,
}
OTHER_STAGE = {
    "name": "another",
    "trains": ("dream_queries",),
    "mixture": {"scenes": 1.0},
    "learning_rate": 0.5,
    "steps": 17,
    "batch": 96,
    "lm_loss_weight": 2.0,
    "image_loss_weight": 1.0,
    "warmup": 1,
    "ema_decay": 0.0,
    "read_last": True,
    "timestep_exponent": 2.0,
}


def planned_text(settings=None, stage=None, **options):
    """The plan of a recipe that differs in one thing from the miniature's second stage."""
    recipe = recipe_of("mini")
    settings, stage = {**recipe.settings.__dict__, **(settings or {})}, replace(recipe.stages[1], **(stage or {}))
    recipe = replace(recipe, stages=(stage,), settings=Settings(**settings), **options)
    return str(plan("mini", gpus=2, gpu_memory=8, device=10, recipe=recipe))


@pytest.mark.parametrize("kind, others", [(Settings, OTHER_SETTINGS), (Stage, OTHER_STAGE)])
def test_every_field_of_a_recipe_is_planned_or_has_a_reason(kind, others):
    names = {field.name for field in fields(kind)}
    assert names == others.keys(), "a new field: give another value here, and plan it or say in NOT_PLANNED why not"
    plain = planned_text()
    for name, value in others.items():
        assert getattr(recipe_of("mini").settings if kind is Settings else MINI[1], name) != value, "another value"
        text = planned_text(**{kind.__name__.lower(): {name: value}})
        assert (text == plain) == (name in NOT_PLANNED), f"{name}: planned, or a reason, but not both"
    assert all(len(NOT_PLANNED[name]) > 10 for name in names & NOT_PLANNED.keys())


def test_a_plan_follows_its_recipe():
    assert {field.name for field in fields(Recipe)} == {"stages", "model", "parts", "settings"}
    assert planned_text(parts={"num_queries": 12}) != planned_text()
    with pytest.raises(ValueError, match="family 'illume'"):
        planned_text(model="illume")
    for scale, gpus in (("mini", 2), ("small", 1), ("paper", 8)):
        recipe, text = recipe_of(scale), str(plan(scale, 1, gpus))
        assert f"documents of {recipe.settings.max_length:,} tokens" in text, "not the model's context"
        assert ("with checkpointing" in text) == recipe.settings.checkpointing
        assert ("VAE stored" in text) == recipe.settings.store
        assert recipe.stages[0].name in text
    assert [stage.name for stage in plan("mini", gpus=2, device=10).stages] == [stage.name for stage in MINI]
    assert "documents of 300 tokens" in str(plan("mini", 1, 1, length=300))
    with pytest.raises(ValueError, match="8 lanes"):
        plan("mini", gpus=16)


def test_the_rank_with_the_most_lanes_counts():
    """Eight lanes on three GPUs: 3, 3 and 2 of them, so 48 of 128 documents, not 43."""
    stage = plan("mini", 2, gpus=3, gpu_memory=80).stages[0]
    assert stage.micro_batch * stage.accumulation == 48


def test_all_frozen_parts_stay_on_the_gpu_also_when_their_outputs_are_stored():
    """As the engine keeps them."""
    one, other = (plan("mini", 1, 1, cached=cached).stages[0].items["frozen parts"] for cached in (True, False))
    assert one == other == 2 * sum(w.numel() for w in weights_of(scale_config("mini")) if w.part in FROZEN)


def test_loading_must_fit_too():
    config = scale_config("paper")
    own = [w for w in weights_of(config) if w.part not in FROZEN]
    frozen = 2 * sum(w.numel() for w in weights_of(config) if w.part in FROZEN)
    root = 4 * sum(w.numel() for w in own if w.unit == "root")
    shares = 4 * sum(w.numel(8) for w in own)
    assert loading_bytes(config, 8)["GPU"] == frozen + shares + root
    assert loading_bytes(config, 1, "single")["GPU"] > 4 * sum(w.numel() for w in own)
    assert loading_bytes(config, 8)["host"] < 4 * sum(w.numel() for w in own) / 3, "never the whole model"
    assert not plan("paper", 1, 8, 1e-9 * loading_bytes(config, 8)["GPU"], reserve=0.01).fits


def test_stage_two_fits_on_eight_times_24_gb_as_the_plan_says():
    """A claim that loading used to break: 27 GB of float32 weights came to every GPU first."""
    planned = plan("paper", 2, 8, 24, micro_batch=1).stages[0]
    assert planned.loading["GPU"] < 24e9 * 0.9 < 4 * sum(
        w.numel() for w in weights_of(scale_config("paper")) if w.part not in FROZEN
    )
    assert planned.fits and planned.total < 24e9
