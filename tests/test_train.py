"""Training at full scale, proven on a CPU: every way of sharing the work gives the same numbers; crashes lose
nothing; bad input is named."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from dreamllm_edu.app.train import main, read_options
from dreamllm_edu.data.readers import emoji
from dreamllm_edu.data.records import Corpus, Record
from dreamllm_edu.models.dreamllm.family import DreamLLMFamily
from dreamllm_edu.models.dreamllm.objective import DreamLLMObjective
from dreamllm_edu.sequences import first_fit
from dreamllm_edu.training import checkpoint
from dreamllm_edu.training.batches import Steps, pack_items, step_stream
from dreamllm_edu.training.checkpoint import last_checkpoint, load_checkpoint, save_checkpoint
from dreamllm_edu.training.features import FeatureStore, fill_store, fingerprint, frozen_features
from dreamllm_edu.training.recipe import read_recipe, recipe_of
from dreamllm_edu.training.report import read_log, report
from dreamllm_edu.training.stage import Settings, Stage, set_trainable
from dreamllm_edu.training.strategies import Share, Strategy, ZeRO3
from dreamllm_edu.training.trainer import Trainer

from conftest import make_tiny

ALIGN = ("visual_projector", "dream_queries", "condition_projector", "pooled_projector")
ROOT = Path(__file__).parent.parent
KINDS = {"pairs/draw": 0.4, "pairs/caption": 0.3, "articles": 0.3}


def thin(corpus, every=50):
    """Every 50th document of a corpus: the tests' encoders are small, the world is not."""
    return replace(corpus, read=lambda shard: (r for i, r in enumerate(corpus.read(shard)) if i % every == 0))


def some_corpora():
    return [thin(emoji(kind, [kind], weight=weight)) for kind, weight in KINDS.items()]


def texts_only(name="texts", n=40):
    return Corpus(
        name,
        ("all",),
        lambda shard: (Record([f"a line of text, number {i}"], 0, f"{name}:{i}", name) for i in range(n)),
        1.0,
    )


def stage(number, **options):
    trains = ALIGN + (() if number == 1 else ("language_model",))
    return Stage(
        f"{number}-test",
        trains,
        {},
        **{"learning_rate": 1e-3, "steps": 5, "batch": 8, "ema_decay": 0.9, "warmup": 1, "read_last": False, **options},
    )


QUICK = Settings(lanes=4, save_every=2, log_every=2, max_length=256)


def run(model, processor, what, corpora, folder, settings=QUICK, **options):
    """Train one stage; the rows of its log."""
    return Trainer.of_stage(
        DreamLLMFamily(model, processor), what, corpora, folder, settings, progress=False, **options
    ).train()


def steps_of(corpora, processor, model, rank=0, world=1, per_lane=1, store=None, read_last=False, workers=0, **options):
    """The stream of steps of four lanes, `per_lane` documents each."""
    family, what = DreamLLMFamily(model, processor), stage(2, batch=4 * per_lane, read_last=read_last)
    return step_stream(
        Steps(family, family.objective(what), what, corpora, replace(QUICK, **options), rank, world, store=store),
        workers,
    )


def losses_of(model, processor, items, max_length=256):
    """Token losses, picture losses and the zero of a packed batch."""
    family = DreamLLMFamily(model, processor)
    objective = family.objective(stage(2))
    batch = pack_items(items, family.layout, max_length, objective.extra_rows(family.layout))
    losses, zero = objective.losses(model, batch, frozen_features(family, batch, "cpu"))
    return losses["lm"], losses["image"], zero


def share_of(tensor):
    return Strategy().share(tensor)


def curve(folder, keys=("step", "lr", "lm", "image", "norm")):
    return [{key: row.get(key) for key in keys} for row in read_log(Path(folder) / "log.jsonl")]


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


# --- one process


def test_first_fit_keeps_every_document_once_and_no_row_overflows():
    lengths = [5, 3, 8, 1, 1, 7, 2]
    rows = first_fit(lengths, 8)
    assert sorted(i for row in rows for i in row) == list(range(7)) and all(
        sum(lengths[i] for i in row) <= 8 for row in rows
    )
    assert len(rows) == 4
    with pytest.raises(ValueError, match="9 tokens does not fit a row of 8"):
        first_fit([9], 8)
    assert first_fit([], 8) == []


@pytest.mark.parametrize("workers", [0, 2, 3])
def test_documents_and_dice_do_not_depend_on_ranks_or_workers(processor, workers):
    one = steps_of(some_corpora(), processor, make_tiny(), per_lane=2)
    shares = [steps_of(some_corpora(), processor, make_tiny(), rank, 2, 2, workers=workers) for rank in (0, 1)]
    for _ in range(3):
        whole = next(one)[0]
        parts = sorted((item for share in shares for item in next(share)[0]), key=lambda item: item.order)
        assert [item.name for item in parts] == [item.name for item in whole]
        assert all(torch.equal(a.random[key], b.random[key]) for a, b in zip(parts, whole) for key in a.random)


def test_with_mixing_by_step_a_step_has_one_corpus_and_its_own_number_of_documents(processor):
    corpora = [replace(corpus, documents=4 if corpus.name == "articles" else None) for corpus in some_corpora()]
    one = steps_of(corpora, processor, make_tiny(), per_lane=2, mixing="step")
    shares = [steps_of(corpora, processor, make_tiny(), rank, 2, 2, mixing="step") for rank in (0, 1)]
    names = []
    for _ in range(12):
        whole = next(one)[0]
        assert len({item.corpus for item in whole}) == 1, "all documents of a step are of one corpus"
        assert len(whole) == (4 if whole[0].corpus == "articles" else 8)
        parts = sorted((item for share in shares for item in next(share)[0]), key=lambda item: item.order)
        assert [item.name for item in parts] == [item.name for item in whole], "on every rank the same corpus"
        names.append(whole[0].corpus)
    assert set(names) == set(KINDS), "and every corpus has its turn"
    with pytest.raises(ValueError, match="multiple of the lanes"):
        steps_of([replace(corpora[0], documents=5)], processor, make_tiny(), mixing="step")
    with pytest.raises(ValueError, match="mixing='batch': use one of document, step"):
        replace(QUICK, mixing="batch")


def test_loading_processes_are_not_sent_the_model(processor):
    """Where processes are spawned, not forked, what they need is pickled."""
    model, what = make_tiny(), stage(2, batch=4)
    family = DreamLLMFamily(model, processor)
    emojis = [emoji("pairs/caption", ["pairs/caption"]), emoji("pairs/draw", ["pairs/draw"])]
    steps = Steps(family, family.objective(what), what, emojis, QUICK)
    items = next(step_stream(pickle.loads(pickle.dumps(steps))))[0]
    assert [item.name for item in items] == [item.name for item in next(step_stream(steps))[0]]
    without = len(pickle.dumps(emojis)) + len(pickle.dumps(processor))
    assert len(pickle.dumps(steps)) < without + 100_000 < without + len(pickle.dumps(model))


def test_a_batch_without_documents_or_pictures_trains_nothing_and_breaks_nothing(processor):
    model = make_tiny().train()
    set_trainable(model, stage(2))
    tokens, pictures, zero = losses_of(model, processor, [], 64)
    assert len(tokens) == len(pictures) == 0
    zero.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(g is not None and g.abs().max() == 0 for g in grads.values()), [n for n, g in grads.items() if g is None]


@pytest.mark.parametrize("sdxl", [False, True])
def test_without_pictures_every_trained_tensor_has_a_gradient_of_zero(processor, sdxl):
    """A rank whose gradient is missing, not zero, would let the others wait for it forever."""
    from dreamllm_edu.models.dreamllm.config import DreamLLMConfig
    from dreamllm_edu.models.dreamllm.model import DreamLLM

    config = make_tiny().config.to_dict()
    if sdxl:
        config["unet_config"].update(
            addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 24
        )
    model = DreamLLM(DreamLLMConfig(**config)).train()
    set_trainable(model, stage(2))
    texts = next(steps_of([texts_only()], processor, model))[0]
    tokens, pictures, zero = losses_of(model, processor, texts)
    (tokens.sum() + pictures.sum() + zero).backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(grad is not None for grad in trained.values()), [name for name, grad in trained.items() if grad is None]
    assert ("pooled_projector.linear.weight" in trained) == sdxl
    assert all(grad.eq(0).all() for name, grad in trained.items() if name.startswith(("pooled", "condition")))


def test_unused_pictures_cost_no_encoder_pass(processor, monkeypatch):
    model, passes = make_tiny(), {"clip": 0, "vae": 0}
    for key, part in (("clip", model.vision_encoder), ("vae", model.vae.encoder)):
        part.register_forward_hook(lambda *_, key=key: passes.__setitem__(key, passes[key] + 1))
    items = {
        kind: next(steps_of([thin(emoji(kind, [kind]))], processor, model))[0]
        for kind in ("pairs/draw", "pairs/caption")
    }
    with torch.no_grad():
        losses_of(model, processor, items["pairs/draw"])
        assert passes == {"clip": 0, "vae": 1}, "a drawing that ends its document is not read"
        losses_of(model, processor, items["pairs/caption"])
        assert passes == {"clip": 1, "vae": 1}, "a given picture is not drawn"
        losses_of(model, processor, next(steps_of([texts_only()], processor, model, read_last=True))[0])
        assert passes == {"clip": 1, "vae": 1}, "text needs neither"


def test_stored_features_change_no_loss(processor, tmp_path):
    model, corpora = make_tiny(), some_corpora()
    family = DreamLLMFamily(model, processor)
    exact = FeatureStore(tmp_path, fingerprint(family), torch.float32)
    done = fill_store(exact, family, corpora)
    assert done["features"] > 10 and done["moments"] > 10 and fill_store(exact, family, corpora)["features"] == 0
    make = lambda store: next(steps_of(corpora, processor, model, per_lane=3, store=store))[0]
    assert not any(item.pixels for item in make(exact))
    with torch.no_grad():
        read, made = [losses_of(model, processor, make(store)) for store in (exact, None)]
    for a, b in zip(read[:2], made[:2]):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    other = make_tiny(seed=1)
    assert fingerprint(DreamLLMFamily(other, processor)) != fingerprint(family), (
        "another encoder's features must not be read"
    )


def test_a_store_that_holds_some_pictures_mixes_none_up(processor, tmp_path):
    model, corpora = make_tiny(), some_corpora()
    family = DreamLLMFamily(model, processor)
    store = FeatureStore(tmp_path, fingerprint(family), torch.float32)
    fill_store(store, family, [replace(c, read=lambda shard, c=c: list(c.read(shard))[::2]) for c in corpora])
    make = lambda store: next(steps_of(corpora, processor, model, per_lane=4, store=store))[0]
    items = make(store)
    assert {("images" not in i.stored, "images" not in i.pixels) for i in items if i.row.images} == {
        (True, False),
        (False, True),
    }, "stored and fresh in one batch"
    assert {("targets" not in i.stored, "targets" not in i.pixels) for i in items if i.row.targets} == {
        (True, False),
        (False, True),
    }
    with torch.no_grad():
        read, made = [losses_of(model, processor, found) for found in (items, make(None))]
    for a, b in zip(read[:2], made[:2]):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_micro_batches_change_nothing(processor, tmp_path):
    found = []
    for micro in (0, 3):
        model = make_tiny()
        run(model, processor, stage(2), some_corpora(), tmp_path / str(micro), replace(QUICK, micro_batch=micro))
        found.append((curve(tmp_path / str(micro)), weights_of(model)))
    for a, b in zip(found[0][0], found[1][0]):
        assert a == pytest.approx(b, abs=1e-5)
    for name, p in found[0][1].items():
        torch.testing.assert_close(p, found[1][1][name], atol=1e-5, rtol=0)


def test_activation_checkpointing_changes_nothing(processor, tmp_path):
    curves = []
    for on in (False, True):
        run(make_tiny(), processor, stage(2), some_corpora(), tmp_path / str(on), replace(QUICK, checkpointing=on))
        curves.append(curve(tmp_path / str(on)))
    for a, b in zip(*curves):
        assert a == pytest.approx(b, abs=1e-5)


# --- crashes


def test_a_resumed_curve_is_the_same_bit_for_bit(processor, tmp_path):
    whole = make_tiny()
    run(whole, processor, stage(2), some_corpora(), tmp_path / "whole", QUICK)
    for died in (1, 3, 4):
        folder = tmp_path / str(died)

        class Death:
            def log(self, values, step, died=died):
                if step == died:
                    raise MemoryError
        with pytest.raises(MemoryError):
            run(make_tiny(), processor, stage(2), some_corpora(), folder, QUICK, trackers=[Death()])
        again = make_tiny(seed=5)  # what trains must come from the checkpoint; the frozen parts from the same seed
        again.load_state_dict({**again.state_dict(), **{k: v for k, v in make_tiny().state_dict().items()}})
        run(again, processor, stage(2), some_corpora(), folder, QUICK)
        assert curve(folder) == curve(tmp_path / "whole")
        assert all(torch.equal(p, weights_of(whole)[name]) for name, p in weights_of(again).items())


def test_the_last_checkpoints_are_kept_and_a_broken_one_is_passed_over(processor, tmp_path, capsys):
    run(make_tiny(), processor, stage(2, steps=8), some_corpora(), tmp_path, replace(QUICK, keep=2))
    assert [p.name for p in sorted(tmp_path.glob("step-*"))] == ["step-00000006", "step-00000008"]
    before = curve(tmp_path)
    newest = tmp_path / "step-00000008" / "rank-00000.safetensors"
    newest.write_bytes(newest.read_bytes()[:-50])
    assert last_checkpoint(tmp_path)[1]["step"] == 6
    run(make_tiny(), processor, stage(2, steps=8), some_corpora(), tmp_path, QUICK)
    assert "cut off or changed" in capsys.readouterr().err and curve(tmp_path) == before


def test_a_half_written_checkpoint_is_no_checkpoint(tmp_path):
    save_checkpoint(tmp_path, {"model/w": share_of(torch.ones(3))}, {"step": 1})
    (tmp_path / ".step-00000002.part").mkdir()
    (tmp_path / "step-00000003").mkdir()
    assert last_checkpoint(tmp_path, report=lambda text: None)[1]["step"] == 1
    save_checkpoint(tmp_path, {"model/w": share_of(torch.ones(3))}, {"step": 2})
    assert last_checkpoint(tmp_path, report=lambda text: None)[1]["step"] == 2


def test_rows_of_any_number_of_ranks_are_put_together(tmp_path):
    from safetensors.torch import save_file

    whole = torch.arange(14.0).view(7, 2)
    (tmp_path / "step").mkdir()
    for rank, (first, end) in enumerate([(0, 3), (3, 6), (6, 7), (7, 7)]):
        where = {"w": [2 * first, 2 * end, [7, 2]]}
        save_file(
            {"w": whole[first:end].flatten().clone()},
            tmp_path / "step" / f"rank-{rank:05}.safetensors",
            {"shares": json.dumps(where)},
        )
    into = torch.zeros(7, 2)
    load_checkpoint(tmp_path / "step", {"w": share_of(into)})
    assert torch.equal(into, whole)
    for first, end in ((0, 5), (5, 10), (10, 14), (14, 14)):  # elements, as DeepSpeed deals them
        share = Share(torch.zeros(end - first), first, (7, 2))
        load_checkpoint(tmp_path / "step", {"w": share})
        assert torch.equal(share.values, whole.flatten()[first:end])
    with pytest.raises(ValueError, match="other tensors"):
        load_checkpoint(tmp_path / "step", {"v": share_of(torch.zeros(7, 2))})
    for other in ((9, 2), (2, 7)):  # the second has as many elements
        with pytest.raises(ValueError, match="another shape"):
            load_checkpoint(tmp_path / "step", {"w": share_of(torch.zeros(*other))})


def test_a_checkpoint_of_another_run_is_refused(processor, tmp_path):
    run(make_tiny(), processor, stage(2, steps=2), some_corpora(), tmp_path, QUICK)
    for other, settings in (
        (stage(1), QUICK),
        (stage(2), replace(QUICK, seed=3)),
        (stage(2, batch=4), QUICK),
        (stage(2), replace(QUICK, lanes=8)),
    ):
        with pytest.raises(ValueError, match="belongs to a run with another"):
            run(make_tiny(), processor, other, some_corpora(), tmp_path, settings)


def test_a_full_disk_keeps_the_checkpoint_before(processor, tmp_path, monkeypatch):
    class Death:
        def log(self, values, step):
            if step == 2:
                raise MemoryError
    with pytest.raises(MemoryError):
        run(make_tiny(), processor, stage(2, steps=4), some_corpora(), tmp_path, QUICK, trackers=[Death()])
    def full(*_, **__):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="free some space, the checkpoints before are untouched"):
        run(make_tiny(), processor, stage(2, steps=4), some_corpora(), tmp_path, QUICK)
    assert last_checkpoint(tmp_path)[1]["step"] == 2 and not list(tmp_path.glob(".step*"))


# --- bad numbers and bad input


def test_a_step_that_is_not_finite_changes_nothing_and_keeps_its_batch(processor, tmp_path, capsys):
    model = make_tiny()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.unet.conv_out.weight.data.fill_(float("nan"))
    drawings = [thin(emoji("pairs/draw", ["pairs/draw"]))]
    with pytest.raises(FloatingPointError, match="3 steps in a row were not finite, the last 2"):
        run(model, processor, stage(2), drawings, tmp_path, replace(QUICK, save_every=100))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if k != "unet.conv_out.weight")
    kept = sorted(tmp_path.glob("bad-step-*"))
    assert [p.name for p in kept] == [f"bad-step-{i:08}-rank-00000.safetensors" for i in range(3)]
    with safe_open(kept[0], "pt") as file:
        assert (
            "0/input_ids" in file.keys()
            and "0/random/noise" in file.keys()
            and len(json.loads(file.metadata()["names"])[0]) == 8
        )


def test_a_checkpoint_before_any_update_can_be_written_and_read(processor, tmp_path, monkeypatch):
    real = DreamLLMObjective.losses
    def never_finite(*args):
        losses, zero = real(*args)
        return {**losses, "image": losses["image"] * float("nan")}, zero
    drawings = [thin(emoji("pairs/draw", ["pairs/draw"]))]
    monkeypatch.setattr(DreamLLMObjective, "losses", never_finite)
    with pytest.raises(FloatingPointError):
        run(make_tiny(), processor, stage(2), drawings, tmp_path, replace(QUICK, save_every=1))
    monkeypatch.setattr(DreamLLMObjective, "losses", real)
    assert last_checkpoint(tmp_path)[1]["updates"] == 0 and last_checkpoint(tmp_path)[1]["step"] == 2
    run(make_tiny(), processor, stage(2), drawings, tmp_path, QUICK)
    assert [row["step"] for row in read_log(tmp_path / "log.jsonl")] == [0, 1, 2, 3, 4]


def test_one_bad_step_is_skipped_and_training_goes_on(processor, tmp_path, monkeypatch):
    model, real, calls = make_tiny(), DreamLLMObjective.losses, []
    def sometimes(*args):
        calls.append(0)
        losses, zero = real(*args)
        return ({**losses, "lm": losses["lm"] * float("nan")} if len(calls) == 2 else losses), zero
    monkeypatch.setattr(DreamLLMObjective, "losses", sometimes)
    run(model, processor, stage(2), some_corpora(), tmp_path, QUICK)
    norms = [row["norm"] for row in read_log(tmp_path / "log.jsonl")]
    assert [n == n for n in norms] == [True, False, True, True, True] and len(list(tmp_path.glob("bad-*"))) == 1


def test_deepspeed_that_cannot_start_says_why(tmp_path, monkeypatch, capsys):
    for text in ("{", "[]", '{"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match="not a DeepSpeed configuration"):
            ZeRO3(replace(QUICK, deepspeed=str(tmp_path / "bad.json")))
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ValueError, match=r"pip install 'dreamllm_edu\[deepspeed\]'; or take fsdp2"):
        ZeRO3(QUICK)
    assert main(["--parallel", "zero3", "--out", str(tmp_path)]) == 1
    assert "zero3 with one process" in capsys.readouterr().err
    assert main(["--deepspeed", "recipes/zero3.json", "--out", str(tmp_path)]) == 1
    assert "is for zero3, but the strategy is single" in capsys.readouterr().err


def test_settings_that_cannot_work_are_named(processor, tmp_path):
    with pytest.raises(ValueError, match="multiple of the lanes"):
        run(make_tiny(), processor, stage(2, batch=6), some_corpora(), tmp_path, QUICK)
    with pytest.raises(ValueError, match="something to learn from"):
        run(make_tiny(), processor, stage(2), [], tmp_path, QUICK)
    processor = type(processor)(
        processor.image_processor, processor.tokenizer, num_queries=processor.num_queries, max_length=20
    )
    with pytest.raises(ValueError, match="no picture would ever fit"):
        run(make_tiny(), processor, stage(2), some_corpora(), tmp_path, QUICK)


@pytest.mark.parametrize("text, message", [
    ("stages: [", "not a recipe"), ("stages: 3", "not a recipe"), ("parts: {}", "not a recipe"),
    ("stages: [{name: a, trains: [x], mixture: {}, learning_rate: 1, steps: 1, batch: 1, colour: red}]", "colour"),
    ("settings: {speed: 3}\nstages: []", "speed")])
def test_bad_recipes_are_named(tmp_path, text, message):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_recipe(tmp_path / "r.yaml")


def test_there_is_one_table_of_stages():
    """The command, the planner and the notebooks read the same recipes."""
    from dreamllm_edu.planning import find_stage, stages_of

    for scale in ("mini", "small", "paper"):
        assert read_recipe(ROOT / "recipes" / f"{scale}.yaml") == recipe_of(scale)
        assert stages_of(scale) == recipe_of(scale).stages == read_options(["--scale", scale])[1].stages
        assert find_stage(scale, 2) == recipe_of(scale).stages[1]
    assert recipe_of("paper").settings.weight_decay == 0 and recipe_of("mini").settings.weight_decay == 0.01


def command(*arguments, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "dreamllm_edu.train", *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--scale", "paper"], "--data"),
        (["--stage", "2"], "starts where stage 1 ended"),
        (["--stage", "6"], "5 stages, --stage 6"),
        (["--stage", "0"], "--stage 0"),
        (["--recipe", "nowhere.yaml"], "no such recipe"),
        (["--fill-cache"], "--cache"),
        (["--batch", "7"], "multiple of the lanes"),
    ],
)
def test_the_command_names_what_is_missing(tmp_path, capsys, arguments, message):
    assert main([*arguments, "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_kill_9_and_sigterm_lose_nothing(tmp_path):
    same = [
        "--stage",
        "1",
        "--steps",
        "6",
        "--batch",
        "8",
        "--lanes",
        "4",
        "--save-every",
        "2",
        "--precision",
        "no",
        "--no-store",
    ]
    whole = command(*same, "--out", tmp_path / "whole")
    assert whole.wait(300) == 0, whole.stderr.read()
    for kind, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 130)):
        out = tmp_path / kind.name
        process = command(*same, "--out", out)
        log = out / "1-alignment" / "log.jsonl"
        while process.poll() is None and not (log.exists() and len(log.read_text().splitlines()) >= 3):
            time.sleep(0.02)
        process.send_signal(kind)
        assert process.wait(60) == code, process.stderr.read()
        again = command(*same, "--out", out)
        assert again.wait(300) == 0, again.stderr.read()
        assert curve(out / "1-alignment") == curve(tmp_path / "whole" / "1-alignment")
        assert (out / "1-alignment" / "trained.safetensors").read_bytes() == (
            tmp_path / "whole" / "1-alignment" / "trained.safetensors"
        ).read_bytes()
    assert (
        "stage 1-alignment" not in process.stdout.read()
        and (tmp_path / "whole" / "1-alignment" / "report.html").stat().st_size > 10_000
    )


# --- public parts and published shards


def public_parts(folder):
    """Tiny parts in the layout of the hub: a Llama whose tokenizer knows nothing of pictures, a CLIP, a Stable
    Diffusion."""
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import CLIPModel, LlamaForCausalLM, PreTrainedTokenizerFast

    from dreamllm_edu.parts.diffusion import scheduler_config, unet_config, vae_config
    from dreamllm_edu.parts.language import llama_config
    from dreamllm_edu.parts.vision import clip_config

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    raw.train_from_iterator(
        ["a red apple on a table"] * 4,
        trainers.BpeTrainer(
            vocab_size=280,
            special_tokens=["<s>", "</s>"],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder / "language")
    torch.manual_seed(0)
    LlamaForCausalLM(
        llama_config(vocab_size=len(tokenizer), hidden=32, layers=2, heads=2, ffn=64, context=256)
    ).save_pretrained(folder / "language")
    CLIPModel(clip_config(vocab_size=300, hidden=32, layers=2, text_layers=1, heads=2)).save_pretrained(
        folder / "vision"
    )
    UNet2DConditionModel(**unet_config(channels=(16, 32), latent_channels=4, condition=24, heads=2)).save_pretrained(
        folder / "diffusion" / "unet"
    )
    AutoencoderKL(**vae_config(channels=(8, 8, 8, 8), latent_channels=4)).save_pretrained(folder / "diffusion" / "vae")
    DDPMScheduler(**scheduler_config()).save_pretrained(folder / "diffusion" / "scheduler")
    return len(tokenizer), {name: str(folder / name) for name in ("language", "vision", "diffusion")}


def test_public_parts_and_a_published_corpus_train_by_the_command(tmp_path, capsys):
    import yaml

    from dreamllm_edu.data.world import World

    vocabulary, parts = public_parts(tmp_path / "parts")
    (tmp_path / "data" / "images").mkdir(parents=True)
    rows = []
    for i, key in enumerate(("1f34e", "1f431", "1f98a", "1f680")):
        World().picture(f"twemoji/{key}").save(tmp_path / "data" / "images" / f"{key}.png")
        turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "a thing"}] * (
            1 + i % 2
        )
        turns = [
            {**turn, "value": turn["value"].replace("<image>\n", "") if j else turn["value"]}
            for j, turn in enumerate(turns)
        ]
        rows.append({"id": str(i), "image": f"{key}.png", "conversations": turns})
    (tmp_path / "data" / "chat.json").write_text(json.dumps(rows))
    entry = {"format": "llava", "shards": "chat.json", "images": "images", "weight": 1}
    one = {
        "name": "1-alignment",
        "trains": list(ALIGN),
        "learning_rate": 1e-3,
        "steps": 2,
        "batch": 4,
        "warmup": 1,
        "ema_decay": 0.0,
        "mixture": {"chat": entry},
    }
    two = {**one, "name": "2-interleaved", "trains": [*ALIGN, "language_model"]}
    recipe = {
        "parts": {**parts, "num_queries": 4},
        "settings": {"lanes": 4, "max_length": 256, "save_every": 1},
        "stages": [one, two],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    line = [
        "--scale",
        "small",
        "--recipe",
        str(tmp_path / "recipe.yaml"),
        "--data",
        str(tmp_path / "data"),
        "--out",
        str(tmp_path / "out"),
    ]
    for number in ("1", "2"):
        assert main([*line, "--stage", number]) == 0, capsys.readouterr().err
    family = DreamLLMFamily.build("small", {**parts, "num_queries": 4}, 256)
    family.load(tmp_path / "out" / "2-interleaved" / "trained.safetensors")
    model, processor = family.model, family.processor
    assert model.get_input_embeddings().num_embeddings == len(processor.tokenizer) == vocabulary + 7
    assert processor.target_size == 64 and all(
        row["lm"] > 0 for row in read_log(tmp_path / "out" / "2-interleaved" / "log.jsonl")
    )
    rows[1]["image"] = "absent.png"
    (tmp_path / "data" / "chat.json").unlink()
    assert main([*line, "--stage", "2"]) == 1 and "chat.json" in capsys.readouterr().err


# --- watching it


def test_samples_and_report_show_what_was_learned(processor, tmp_path):
    from dreamllm_edu.documents.document import Document
    from dreamllm_edu.documents.formats import read_jsonl

    prompts = [Document(["a red apple"]), Document(["a blue boat"])]
    run(make_tiny(), processor, stage(2), some_corpora(), tmp_path, replace(QUICK, sample_every=2), samples=prompts)
    drawn = {path.name: read_jsonl(path) for path in tmp_path.glob("samples-*.jsonl")}
    assert sorted(drawn) == ["samples-00000002.jsonl", "samples-00000004.jsonl"]
    assert all(
        d.parts[0].startswith(p.parts[0]) for found in drawn.values() for d, p in zip(found, prompts, strict=True)
    )
    page = report(tmp_path, "A <run>").read_text()
    assert "A &lt;run&gt;" in page and "after 2 steps" in page and "a red apple" in page and "data:image/png" in page
    with pytest.raises(ValueError, match="nothing logged"):
        report(tmp_path / "elsewhere")


def test_sampling_changes_no_number(processor, tmp_path):
    from dreamllm_edu.documents.document import Document

    for every in (0, 1):
        run(
            make_tiny(),
            processor,
            stage(2),
            some_corpora(),
            tmp_path / str(every),
            replace(QUICK, sample_every=every),
            samples=[Document(["a"])],
        )
    assert curve(tmp_path / "0") == curve(tmp_path / "1")


def test_the_log_holds_what_one_wants_to_watch(processor, tmp_path):
    run(make_tiny(), processor, stage(2, batch=16), some_corpora(), tmp_path, replace(QUICK, log_every=1))
    rows = read_log(tmp_path / "log.jsonl")
    keys = {key for row in rows for key in row}
    assert {
        "lm/pairs/caption",
        "image/pairs/draw",
        "norm/language_model",
        "norm/dream_queries",
        "lr",
        "samples_per_second",
        "tokens_per_second",
        "memory_mb",
    } <= keys
    for row in rows:
        parts = [row[k] for k in row if k.startswith("norm/")]
        assert sum(p * p for p in parts) ** 0.5 == pytest.approx(row["norm"], rel=1e-4)


@pytest.mark.parametrize("asked, written", [([], True), (["--trackers", "tensorboard"], True), (["--trackers"], False)])
def test_tensorboard_is_the_default(tmp_path, asked, written):
    pytest.importorskip("tensorboard")
    assert (
        main(
            [
                "--steps",
                "1",
                "--batch",
                "4",
                "--lanes",
                "4",
                "--precision",
                "no",
                "--no-store",
                *asked,
                "--out",
                str(tmp_path),
            ]
        )
        == 0
    )
    assert bool(list(tmp_path.rglob("events.out.tfevents.*"))) == written
