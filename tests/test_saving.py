"""What is saved is whole, belongs together and comes back; a run that is stopped anywhere goes on as if nothing had
happened."""

import errno
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import GenerationConfig, LlamaForCausalLM

import dreamllm_edu.app.demo
import dreamllm_edu.evaluation.metrics
import dreamllm_edu.evaluation.suite
import dreamllm_edu.models.dreamllm.weights
import dreamllm_edu.training.trainer
from dreamllm_edu import data
from dreamllm_edu.app.cli import main
from dreamllm_edu.documents.document import Document, Dream
from dreamllm_edu.documents.formats import document_from_markdown
from dreamllm_edu.evaluation.judge import load_judge
from dreamllm_edu.files import WEIGHTS, check_output, write_folder, write_or_rescue, write_text
from dreamllm_edu.models.dreamllm.model import DreamLLM
from dreamllm_edu.models.dreamllm.pipeline import DreamLLMPipeline
from dreamllm_edu.models.dreamllm.processor import DreamLLMProcessor
from dreamllm_edu.models.dreamllm.weights import WEIGHT_FILES, check_frozen_parts, load_trained, save_trained
from dreamllm_edu.parts.loading import load_part, quiet, weights_checksum
from dreamllm_edu.parts.tokenizer import read_tokenizer
from dreamllm_edu.pretraining import keep_record, plain_vae
from dreamllm_edu.training.batches import Steps
from dreamllm_edu.training.checkpoint import last_checkpoint
from dreamllm_edu.training.recipe import corpora_of, recipe_of
from dreamllm_edu.training.report import read_log
from dreamllm_edu.training.stage import Settings
from dreamllm_edu.training.strategies import Strategy
from dreamllm_edu.training.trainer import Stopper, Trainer, resident_memory_mb, train_part

from conftest import full_disk, make_tiny, picture

# ---------------------------------------------------------------- a stopped run

class Net(torch.nn.Module):
    """With a batch norm, whose counts a forward pass changes."""
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.norm, self.b = torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 1)

    def forward(self, x):
        return self.b(self.norm(self.a(x)).relu())


def loss_of_step(model, step, generator):
    x = torch.randn(16, 3, generator=generator)
    return {"loss": (model(x).float() - x.sum(1, keepdim=True)).square().mean()}


def run(folder=None, seed=0, weights=0, steps=8, rate=1e-2, read=5, **options):
    return train_part(
        Net(weights),
        loss_of_step,
        steps,
        rate,
        folder=folder,
        seed=seed,
        warmup=2,
        ema_decay=0.9,
        precision="no",
        progress=False,
        reads={"encoder": Net(read)},
        **options,
    )


@pytest.mark.parametrize("where", ["loss_of_step", "gradients", "update", "average", "log"])
def test_ctrl_c_anywhere_in_a_step_resumes_to_the_last_bit(where, tmp_path, monkeypatch):
    whole, history = run()
    calls = []

    def interrupt(real, nth):
        def interrupted(*args, **kwargs):
            found = real(*args, **kwargs)
            calls.append(1)
            if len(calls) == nth:
                signal.raise_signal(signal.SIGINT)
            return found

        return interrupted

    if where == "average":  # `share` is called for each of the six tensors that train
        monkeypatch.setattr(Strategy, "share", lambda self, p, key=None, real=Strategy.share: real(self, p, key))
        started = Trainer.start

        def start(self):
            started(self)
            monkeypatch.setattr(Strategy, "share", interrupt(Strategy.share, 3 * len(self.trained) + 2))

        monkeypatch.setattr(Trainer, "start", start)
    else:
        owner, name = {
            "loss_of_step": (dreamllm_edu.training.trainer.PartTask, "loss"),
            "gradients": (Trainer, "gradients"),
            "update": (Strategy, "step"),
            "log": (dreamllm_edu.training.trainer.Log, "write"),
        }[where]
        monkeypatch.setattr(owner, name, interrupt(getattr(owner, name), 4))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt, match="after 4 of 8 steps"):
            run(tmp_path)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "the handler that was there is back"
    finally:
        signal.signal(signal.SIGINT, before)
    monkeypatch.undo()
    assert last_checkpoint(tmp_path)[1]["step"] == 4
    again, resumed = run(tmp_path)
    assert [r["loss"] for r in history] == [r["loss"] for r in resumed]
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values()))


def test_convolutions_with_channels_last_resume_to_the_last_bit(tmp_path):
    """As the VAE, the U-Net and the judge are trained: their weights lie in memory in another order than their names
    say, those of 1 x 1 convolutions in the same one."""
    def net():
        torch.manual_seed(0)
        layers = (torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 6, 1), torch.nn.Conv2d(6, 1, 1))
        return torch.nn.Sequential(*layers).to(memory_format=torch.channels_last)

    def train(folder, **options):
        loss = lambda m, step, g: {"loss": m(torch.randn(2, 3, 5, 5, generator=g)).square().mean()}
        return train_part(net(), loss, 6, 1e-2, folder=folder, warmup=1, ema_decay=0.9, precision="no", save_every=2,
                          progress=False, **options)

    def die(step, trainer):
        if step == 2:
            raise MemoryError

    whole, history = train(None)
    with pytest.raises(MemoryError):
        train(tmp_path, on_step=die)
    again, resumed = train(tmp_path)
    assert [row["loss"] for row in history] == [row["loss"] for row in resumed]
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values()))


def test_who_ignores_ctrl_c_goes_on_ignoring_it():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Stopper() as stopper:
            signal.raise_signal(signal.SIGINT)
        assert not stopper.asked and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_second_ctrl_c_stops_at_once():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), Stopper() as stopper:
            signal.raise_signal(signal.SIGINT)
            assert stopper.asked
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_thread_trains_without_a_handler_of_its_own():
    """Only the main thread gets signals; another one must be able to train all the same."""
    import threading

    made = []
    thread = threading.Thread(target=lambda: made.append(run(steps=2)))
    thread.start()
    thread.join(60)
    assert len(made) == 1 and len(made[0][1]) == 2


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_checkpoint_is_not_taken_for_another_run(tmp_path):
    run(tmp_path)
    before = files_of(tmp_path)
    assert {"step-00000008/manifest.json", "step-00000008/rank-00000.safetensors", "log.jsonl"} == set(before)
    with pytest.raises(ValueError, match="another seed .*give a new folder"):
        run(tmp_path, seed=1)
    for other, word in (
        ({"weights": 1}, "starting weights"),
        ({"steps": 4}, "number of steps"),
        ({"steps": 9}, "number of steps"),
        ({"rate": 2e-2}, "learning rate"),
        ({"read": 6}, "encoder"),
    ):
        with pytest.raises(ValueError, match=f"another {word} .*give a new folder"):
            run(tmp_path, **other)
    assert files_of(tmp_path) == before
    run(tmp_path)
    assert files_of(tmp_path) == before, "nothing was left to do"


def test_the_first_checkpoint_after_a_damaged_one_is_kept(tmp_path, capsys):
    """A part keeps one checkpoint. When it is damaged, training starts anew; the next stop must leave a checkpoint,
    though the damaged one has a higher number."""
    whole, _ = run(tmp_path)
    newest = tmp_path / "step-00000008" / "rank-00000.safetensors"
    newest.write_bytes(newest.read_bytes()[:-50])

    def stop(step, trainer):
        if step == 2:
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt, match="after 4 of 8 steps; run the same command again"):
            run(tmp_path, on_step=stop)
    finally:
        signal.signal(signal.SIGINT, before)
    assert "cut off or changed" in capsys.readouterr().err
    assert last_checkpoint(tmp_path, report=lambda text: None)[1]["step"] == 4
    again, rows = run(tmp_path)
    assert [row["step"] for row in rows] == [row["step"] for row in read_log(tmp_path / "log.jsonl")] == list(range(8))
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values()))


def test_a_second_training_of_the_decoder_begins_where_the_first_began(tmp_path):
    vae, out, folder = make_tiny().vae.half(), tmp_path / "parts", tmp_path / "work"
    vae.save_pretrained(out / "vae")
    begun = weights_checksum(plain_vae(out, folder))
    with torch.no_grad():
        vae.decoder.conv_out.bias += 1
    vae.save_pretrained(out / "vae")  # as the first training leaves it
    assert weights_checksum(plain_vae(out, folder)) == begun
    with torch.no_grad():
        vae.encoder.conv_out.bias += 1
    vae.save_pretrained(out / "vae")  # a new VAE altogether
    assert weights_checksum(plain_vae(out, folder)) == weights_checksum(vae.float()) != begun
    assert weights_checksum(plain_vae(out, folder)) == weights_checksum(vae), "and that one is kept now"


def test_the_record_forgets_the_decoder_of_a_former_vae(tmp_path):
    for part in ("vae", "decoder", "judge", "vae"):
        keep_record(tmp_path / "r.json", part, [{"step": 0, "seconds": 1.0}])
    assert json.loads((tmp_path / "r.json").read_text()).keys() == {"vae", "judge"}


def test_parts_in_half_precision_make_no_false_alarm(tmp_path):
    save_trained(make_tiny(1), tmp_path / "t.safetensors")
    check_frozen_parts(make_tiny(1).bfloat16(), tmp_path / "t.safetensors")
    save_trained(make_tiny(1).bfloat16(), tmp_path / "half.safetensors")
    check_frozen_parts(make_tiny(1), tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match="other parts"):
        check_frozen_parts(make_tiny(2), tmp_path / "t.safetensors")


def test_the_hub_is_told_the_name_of_the_folder(tmp_path, monkeypatch, processor):
    asked = []
    for cls in (
        dreamllm_edu.models.dreamllm.weights.PreTrainedModel,
        dreamllm_edu.models.dreamllm.processor.ProcessorMixin,
    ):
        monkeypatch.setattr(cls, "save_pretrained", lambda self, folder, **options: asked.append(options["repo_id"]))
    for thing in (make_tiny(), processor):
        thing.save_pretrained(tmp_path / "my-model", push_to_hub=True)
        thing.save_pretrained(tmp_path / "my-model", push_to_hub=True, repo_id="me/other")
    assert asked == ["my-model", "me/other"] * 2


def test_the_sum_of_weights_sees_one_bit_a_name_and_a_frozen_weight():
    net = Net()
    sums = {weights_checksum(net), weights_checksum(torch.nn.ModuleDict({"other": net}))}
    net.a.requires_grad_(False)
    assert weights_checksum(net) in sums
    with torch.no_grad():
        net.a.bias[0] = torch.nextafter(net.a.bias[0], torch.tensor(9.0))
    sums.add(weights_checksum(net))
    net.norm.num_batches_tracked += 1
    assert len(sums | {weights_checksum(net)}) == 4


def test_a_step_of_articles_holds_a_third_and_one_of_definitions_more(processor, world):
    """Articles are three times as long as pairs, definitions shorter: the recipe says how many are in a step."""
    from dreamllm_edu.models.dreamllm.family import DreamLLMFamily

    recipe = recipe_of("mini")
    family, stage, settings = DreamLLMFamily(make_tiny(), processor), recipe.stages[1], recipe.settings
    corpora = {corpus.name: corpus for corpus in corpora_of(stage, world=world)}
    assert {name for name, corpus in corpora.items() if corpus.documents} == {"articles", "definitions"}
    assert 0.28 * stage.batch < corpora["articles"].documents < 0.36 * stage.batch < stage.batch
    settings = Settings(lanes=settings.lanes, mixing=settings.mixing, max_length=settings.max_length)
    for name in ("articles", "definitions", "pairs/draw"):
        items, _ = next(iter(Steps(family, family.objective(stage), stage, [corpora[name]], settings)))
        assert len(items) == (corpora[name].documents or stage.batch) and {item.corpus for item in items} == {name}


# ---------------------------------------------------------------- models

@pytest.mark.parametrize("shown", [True, False])
def test_loading_quietly_leaves_progress_bars_as_they_were(shown):
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging
    libraries = (diffusers_logging, transformers_logging)
    before = [library.is_progress_bar_enabled() for library in libraries]
    switch = lambda library, on: library.enable_progress_bar() if on else library.disable_progress_bar()
    try:
        for library in libraries:
            switch(library, shown)
        with quiet():
            assert not any(library.is_progress_bar_enabled() for library in libraries)
        assert all(library.is_progress_bar_enabled() is shown for library in libraries)
    finally:
        for library, on in zip(libraries, before):
            switch(library, on)


def test_a_head_that_is_not_tied_is_kept(tmp_path):
    def loose(seed):
        model = make_tiny(seed)
        model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
        model.language_model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.language_model.lm_head.weight))
        return model
    first, second = loose(1), loose(2)
    save_trained(first, tmp_path / "t.safetensors")
    load_trained(second, tmp_path / "t.safetensors")
    assert torch.equal(second.language_model.lm_head.weight, first.language_model.lm_head.weight.half().float())


@pytest.mark.parametrize("sizes", [(None, "200KB"), ("200KB", None), ("200KB", "100KB")])
def test_the_newest_save_is_the_one_that_is_loaded(sizes, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for seed, size in enumerate(sizes):
        make_tiny(seed).save_pretrained(tmp_path, **({"max_shard_size": size} if size else {}))
    again = DreamLLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), make_tiny(1).state_dict().values()))
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: DreamLLM.from_pretrained(folder, dtype=torch.bfloat16),
        lambda folder: DreamLLM.from_pretrained(folder).to(torch.bfloat16),
    ],
)
def test_a_half_precision_model_draws(make, tmp_path, processor):
    make_tiny(3).save_pretrained(tmp_path)
    model = make(tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    answer = model.generate(
        Document(["a cat:", Dream(), picture(1)]), processor, max_new_tokens=2, num_inference_steps=2
    )
    assert len(answer.pictures) >= 2


def test_the_miniature_comes_in_the_precision_that_is_asked_for():
    model, info = DreamLLM.from_pretrained("mini", dtype="bfloat16", output_loading_info=True)
    assert model.dtype == torch.bfloat16 and not any(info.values())
    assert DreamLLM.from_pretrained("mini", dtype="auto").dtype == torch.float32


def test_a_part_without_all_its_tensors_is_not_used(tmp_path, capsys):
    shutil.copytree(WEIGHTS / "mini", tmp_path / "parts", ignore=shutil.ignore_patterns("dreamllm"))
    path = tmp_path / "parts" / "language" / "model.safetensors"
    whole = load_file(path)
    save_file({k: v for k, v in whole.items() if ".layers.2." not in k}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="language.*tensors are missing"):
        load_part(LlamaForCausalLM, path.parent)
    assert main(["evaluate", "--parts", str(tmp_path / "parts"), "--out", str(tmp_path / "m.json")]) == 1
    assert "tensors are missing" in capsys.readouterr().err
    path.write_bytes(path.read_bytes()[:1000])
    assert main(["evaluate", "--parts", str(tmp_path / "parts"), "--out", str(tmp_path / "m.json")]) == 1
    assert "damaged or cut off" in capsys.readouterr().err and not (tmp_path / "m.json").exists()
    path = tmp_path / "parts" / "clip" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert (
        main(["pretrain", "unet", "--out", str(tmp_path / "parts"), "--runs", str(tmp_path / "work"), "--steps", "1"])
        == 1
    )
    assert "clip" in capsys.readouterr().err


# ---------------------------------------------------------------- a full disk, a cut download

def test_a_full_disk_leaves_metrics_records_and_processors_whole(tmp_path, monkeypatch, processor):
    found = ({"creation": list(range(5000))}, {"x": 1})
    monkeypatch.setattr(dreamllm_edu.evaluation.suite, "full_measure", lambda *a, **k: found)
    old = json.dumps({"old": list(range(2000))})
    (tmp_path / "metrics.json").write_text(old)
    keep_record(tmp_path / "record.json", "vae", [{"step": 0, "seconds": 1.0}])
    record = (tmp_path / "record.json").read_text()
    processor.save_pretrained(tmp_path / "processor")
    before = {p.name: p.read_bytes() for p in (tmp_path / "processor").iterdir()}
    with full_disk(4096):
        code = main(["evaluate", "--out", str(tmp_path / "metrics.json")])
    with full_disk(40), pytest.raises(OSError, match="untouched"):
        keep_record(tmp_path / "record.json", "unet", [{"step": 0, "seconds": 1.0}])
    with full_disk(4096), pytest.raises(OSError, match="untouched"):
        processor.save_pretrained(tmp_path / "processor")
    assert (
        code == 1
        and (tmp_path / "metrics.json").read_text() == old
        and (tmp_path / "record.json").read_text() == record
    )
    assert {p.name: p.read_bytes() for p in (tmp_path / "processor").iterdir()} == before
    assert {p.name for p in tmp_path.iterdir()} == {"metrics.json", "record.json", "processor"}, (
        "nothing is left lying beside"
    )


def test_a_damaged_record_or_tokenizer_is_named(tmp_path, processor):
    (tmp_path / "record.json").write_text("")
    with pytest.raises(ValueError, match="record.json: damaged .*delete it"):
        keep_record(tmp_path / "record.json", "vae", [{"step": 0, "seconds": 1.0}])
    processor.save_pretrained(tmp_path / "p")
    assert DreamLLMProcessor.from_pretrained(tmp_path / "p").max_length == processor.max_length
    cut = tmp_path / "p" / "tokenizer.json"
    cut.write_text(cut.read_text()[:1000])
    for load in (read_tokenizer, DreamLLMProcessor.from_pretrained):
        with pytest.raises(ValueError, match=f"{tmp_path / 'p'}: .*"):
            load(tmp_path / "p")


def test_evaluate_and_generate_refuse_a_folder_as_file_before_the_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dreamllm_edu.evaluation.suite, "full_measure", lambda *a, **k: pytest.fail("it measured first"))
    (tmp_path / "results.html").mkdir()
    (tmp_path / "p.md").write_text("a cat")
    for command in (["evaluate"], ["generate", str(tmp_path / "p.md")]):
        assert main([*command, "--out", str(tmp_path / "results.html")]) == 1
        assert "is a folder; name a file" in capsys.readouterr().err


def test_more_scenes_than_there_are_is_no_error(monkeypatch, world):
    judge = lambda x: (torch.zeros(len(x), 821), torch.zeros(len(x), 5))
    monkeypatch.setattr(
        dreamllm_edu.evaluation.suite,
        "edit",
        lambda model, processor, asked, **o: [Image.new("RGB", (64, 64))] * len(asked),
    )
    monkeypatch.setattr(
        dreamllm_edu.evaluation.suite,
        "draw",
        lambda model, processor, captions, **o: [Image.new("RGB", (64, 64))] * len(captions),
    )
    found = dreamllm_edu.evaluation.suite.measure_tasks(None, None, judge, world, 301)
    assert 0 < found["scenes"]["relation"]["n"] <= 301
    halves = [found["editing"][key]["style_top1"]["n"] for key in ("seen", "held_out_renderings")]
    assert (
        halves == [150, min(151, len(data.edits(world, "held_out_renderings")))]
        and sum(halves)
        == found["editing"]["style_top1"]["n"]
        == found["editing"]["baseline_source"]["concept_top1"]["n"]
    )


def test_one_drawing_is_enough_to_measure_tasks_and_the_empty_half_says_so(monkeypatch, world):
    monkeypatch.setattr(
        dreamllm_edu.evaluation.suite,
        "edit",
        lambda model, processor, asked, **o: [Image.new("RGB", (64, 64))] * len(asked),
    )
    monkeypatch.setattr(
        dreamllm_edu.evaluation.suite,
        "draw",
        lambda model, processor, captions, **o: [Image.new("RGB", (64, 64))] * len(captions),
    )
    found = dreamllm_edu.evaluation.suite.measure_tasks(None, None, load_judge(WEIGHTS / "mini" / "judge"), world, 1)
    assert found["editing"]["seen"]["style_top1"] == {"value": None, "low": None, "high": None, "n": 0}
    assert found["editing"]["held_out_renderings"]["style_top1"]["n"] == found["editing"]["style_top1"]["n"] == 1


def test_who_hands_the_picture_back_keeps_the_thing_and_misses_the_style(monkeypatch, world):
    """The baseline of editing, by a judge that cannot err: it looks every picture up."""
    known = {
        world.picture(f"{style}/{c['key']}").tobytes(): (i, k)
        for i, c in enumerate(world.concepts)
        for k, style in enumerate(data.STYLES)
        if style in c["styles"]
    }

    def verdict(judge, pictures):
        found = [known[p.tobytes()] for p in pictures]
        return tuple(
            F.one_hot(torch.tensor([f[k] for f in found]), n).float() for k, n in ((0, len(world.concepts)), (1, 5))
        )

    monkeypatch.setattr(dreamllm_edu.evaluation.metrics, "judge_pictures", verdict)
    wanted = lambda model, processor, asked, **o: [
        world.picture(f"{r['style']}/{world.by_name[r['concept']]['key']}") for half in halves.values() for r in half
    ]
    monkeypatch.setattr(dreamllm_edu.evaluation.suite, "edit", wanted)
    halves = {
        "seen": data.edits(world, "train")[:20],
        "held_out_renderings": data.edits(world, "held_out_renderings")[:20],
    }
    found = dreamllm_edu.evaluation.suite.score_edits(None, None, None, world, halves)
    for scores in (found, found["seen"], found["held_out_renderings"]):
        assert scores["concept_top1"]["value"] == scores["style_top1"]["value"] == 1
    assert (
        found["baseline_source"]["concept_top1"]["value"] > 0.9 and found["baseline_source"]["style_top1"]["value"] == 0
    )


# ---------------------------------------------------------------- pictures

def test_a_strip_is_read_without_filling_the_memory(processor):
    began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    strip = Image.new("RGB", (1, 300_000), "red")  # scaled as a whole: 19,200,000 pixels high, 3.7 GB and more
    assert processor.pixels([strip, strip.transpose(Image.Transpose.ROTATE_90)]).shape[:2] == (2, 3)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - began < 500_000  # kB


@pytest.mark.parametrize(
    "source", ["my cat.png", "<my cat.png>", "my%20cat.png", 'my cat.png "a cat"', "my cat.png 'a cat'", " my cat.png "]
)
def test_pictures_with_spaces_and_titles_are_pictures(source, tmp_path):
    picture(1).save(tmp_path / "my cat.png")
    found = document_from_markdown(f"see ![a]({source}) there", tmp_path)
    assert found.texts == ["see ", " there"] and len(found.pictures) == 1


def test_a_name_with_brackets_or_percent_signs_is_a_name(tmp_path):
    for name in ("cat(1).png", "100%25.png", "it's.png"):
        picture(1).save(tmp_path / name)
        assert len(document_from_markdown(f"![]({name})", tmp_path).pictures) == 1
    with pytest.raises(ValueError, match="no such file"):
        document_from_markdown("![](gone cat.png)", tmp_path)


def test_a_long_hostile_markdown_is_read_in_time():
    for text in ("![](" + "(" * 20_000, "![" * 20_000, "![](" * 5_000 + " " * 20_000, "![](" + "a" * 200_000):
        assert document_from_markdown(text).text == text


def test_two_documents_share_a_folder(tmp_path):
    first, second = Document(["a", picture(1)]), Document(["b", picture(2)])
    told = [d.to_markdown(tmp_path) for d in (first, second, first)]
    assert told[0] == told[2] != told[1]
    assert [document_from_markdown(t, tmp_path) for t in told] == [first, second, first]
    assert len(list(tmp_path.iterdir())) == 2


# ---------------------------------------------------------------- generate's options

def test_a_generation_config_that_says_nothing_of_sampling_leaves_the_temperature(trained, processor):
    ask = lambda seed, **more: (
        trained.generate(Document(["a cat"]), processor, max_new_tokens=8, max_pictures=0, seed=seed, **more).text
    )
    plain = [ask(seed, temperature=2.0) for seed in range(4)]
    config = GenerationConfig(max_new_tokens=8)
    assert (
        config.do_sample is None
        and [ask(seed, temperature=2.0, generation_config=config) for seed in range(4)] == plain
        and len(set(plain)) > 1
    )
    assert (
        len(
            {
                ask(seed, temperature=2.0, generation_config=GenerationConfig(max_new_tokens=8, do_sample=False))
                for seed in range(4)
            }
        )
        == 1
    )


def test_numbers_that_float32_cannot_hold(trained, processor):
    ask = lambda **more: trained.generate(Document(["a cat"]), processor, max_new_tokens=4, max_pictures=0, **more)
    assert ask(temperature=1e-50) == ask(temperature=0)
    with pytest.raises(ValueError, match="guidance_scale"):
        ask(guidance_scale=1e39)


def test_a_processor_with_a_longer_context_than_the_model_is_refused(trained, processor):
    longer = DreamLLMProcessor(
        processor.image_processor,
        processor.tokenizer,
        num_queries=processor.num_queries,
        num_patches=processor.num_patches,
        max_length=trained.config.text_config.max_position_embeddings + 1,
    )
    with pytest.raises(ValueError, match="give the processor that max_length"):
        trained.generate(Document(["a cat"]), longer)


def test_a_folder_within_a_folder_is_saved_twice(tmp_path):
    for words in ("old", "new"):
        def save(aside, words=words):
            (aside / "sub").mkdir()
            (aside / "sub" / "a.txt").write_text(words)
        write_folder(tmp_path / "out", save)
    assert [p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.txt")] == ["sub/a.txt"]
    assert (tmp_path / "out" / "sub" / "a.txt").read_text() == "new"


def test_a_full_disk_leaves_no_torn_picture(tmp_path):
    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    with full_disk(200), pytest.raises(OSError, match="untouched"):
        Document(["a", noise]).to_markdown(tmp_path / "pictures")
    assert not list((tmp_path / "pictures").iterdir())


@pytest.mark.skipif(os.name != "posix", reason="modes of files")
@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_weights_are_as_readable_as_any_other_file(mask, mode, tmp_path):
    """A teacher trains, students read: safetensors alone would leave the weights to their owner."""
    before = os.umask(mask)
    try:
        model = make_tiny()
        model.save_pretrained(tmp_path / "whole")
        save_trained(model, tmp_path / "trained.safetensors")
        assert os.umask(mask) == mask, "the mask is left as it was"
    finally:
        os.umask(before)
    made = [*tmp_path.rglob("*.safetensors"), *tmp_path.rglob("*.json")]
    assert len(made) >= 3 and {oct(path.stat().st_mode & 0o777) for path in made} == {oct(mode)}


# ---------------------------------------------------------------- where, and when it is cut short

class Killed(BaseException):
    """Stands for `kill -9`: what is done after it does not count."""


def dies_at(monkeypatch, number):
    """From the rename or removal number `number` on, the process can change nothing any more."""
    calls = []
    for name in ("rename", "replace", "unlink", "rmdir"):
        real = getattr(Path, name)

        def may_die(self, *args, real=real, **kwargs):
            calls.append(1)
            if len(calls) > number:
                raise Killed
            return real(self, *args, **kwargs)
        monkeypatch.setattr(Path, name, may_die)
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)


@pytest.mark.parametrize("sizes", [(None, "200KB"), ("200KB", None)], ids=["one file, then shards", "shards, then one"])
def test_a_save_that_is_killed_anywhere_leaves_the_old_or_the_new_model(sizes, tmp_path):
    options = [{"max_shard_size": size} if size else {} for size in sizes]
    states, outcomes = [make_tiny(seed).state_dict() for seed in (0, 1)], []
    for number in range(40):
        folder = tmp_path / str(number)
        make_tiny(0).save_pretrained(folder, **options[0])
        with pytest.MonkeyPatch.context() as patch:
            dies_at(patch, number)
            try:
                make_tiny(1).save_pretrained(folder, **options[1])
                alive = True
            except Killed:
                alive = False
        loaded = DreamLLM.from_pretrained(folder).state_dict()
        same = [all(torch.equal(a, b) for a, b in zip(loaded.values(), state.values())) for state in states]
        assert sum(same) == 1, f"killed at step {number}: a mixture"
        outcomes.append(same.index(True))
        if alive:
            break
    assert alive and outcomes == sorted(outcomes) and set(outcomes) == {0, 1}
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_model_and_processor_of_a_pipeline_are_saved_both_or_none(tmp_path, processor, monkeypatch):
    pipe = DreamLLMPipeline(make_tiny(0), processor)
    pipe.save_pretrained(tmp_path / "p")
    before = files_of(tmp_path / "p")
    monkeypatch.setattr(DreamLLMProcessor, "save_pretrained", lambda *a, **k: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="untouched"):
        DreamLLMPipeline(make_tiny(1), processor).save_pretrained(tmp_path / "p")
    with pytest.raises(OSError, match="untouched"):
        DreamLLMPipeline(make_tiny(1), processor).save_pretrained(tmp_path / "new" / "p")
    assert files_of(tmp_path / "p") == before and [path.name for path in tmp_path.iterdir()] == ["p"]


def test_an_interrupted_save_is_finished_by_whatever_loads_it(tmp_path, processor, monkeypatch):
    for name, save in (("model", make_tiny(1).save_pretrained), ("processor", processor.save_pretrained),
                       ("part", lambda folder: write_folder(folder, make_tiny(1).vae.save_pretrained))):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("dreamllm_edu.files.move_files", lambda *args: (_ for _ in ()).throw(Killed))
            with pytest.raises(Killed):
                save(tmp_path / name)
        assert not list((tmp_path / name).glob("[!.]*"))
    assert DreamLLM.from_pretrained(tmp_path / "model").num_parameters() == make_tiny().num_parameters()
    assert DreamLLMProcessor.from_pretrained(tmp_path / "processor").max_length == processor.max_length
    load_part(AutoencoderKL, tmp_path / "part")
    assert all((tmp_path / name / "config.json").exists() for name in ("model", "part"))


def test_a_rank_that_writes_nothing_removes_nothing(tmp_path):
    make_tiny(0).save_pretrained(tmp_path)
    before = files_of(tmp_path)
    make_tiny(1).save_pretrained(tmp_path, is_main_process=False)
    write_folder(tmp_path, lambda aside: (aside / "adapter_model.safetensors").write_bytes(b""), WEIGHT_FILES)
    assert files_of(tmp_path).keys() == before.keys() | {"adapter_model.safetensors"}


@pytest.mark.skipif(not hasattr(os, "seteuid") or os.geteuid() != 0, reason="plays another user")
def test_a_folder_is_enough_to_save_in(processor):
    """As in a Docker volume: the user may write into the folder, but not beside it."""
    home = tempfile.mkdtemp()
    os.chmod(home, 0o755)
    out = Path(home, "volume")
    out.mkdir()
    make_tiny().save_pretrained(out)  # imports all that saving needs
    (out / "notes.txt").write_text("mine")
    for path in (out, *out.iterdir()):
        os.chown(path, 65534, 65534)
    try:
        os.seteuid(65534)
        make_tiny(1).save_pretrained(out)
        processor.save_pretrained(out)
        save_trained(make_tiny(1), out / "trained.safetensors")
        check_output(out, folder=True)
        check_output(out / "new" / "a.html")
        for name, folder in (("other", True), ("a.html", False), ("new/a.html", False)):
            bad = Path(home, name)
            with pytest.raises(OSError, match="cannot be written .*name another place"):
                check_output(bad, folder=folder)
            with pytest.raises(OSError, match="could not save"):
                write_folder(bad, lambda aside: None) if folder else write_text(bad, "a")
    finally:
        os.seteuid(0)
    assert torch.equal(DreamLLM.from_pretrained(out).dream_queries.weight, make_tiny(1).dream_queries.weight)
    assert (out / "notes.txt").read_text() == "mine" and [path.name for path in Path(home).iterdir()] == ["volume"]
    shutil.rmtree(home)


def test_a_folder_on_another_file_system_and_behind_a_link(tmp_path, monkeypatch):
    elsewhere = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    try:
        (tmp_path / "link").symlink_to(elsewhere)
        make_tiny(1).save_pretrained(tmp_path / "link")
        write_text(tmp_path / "link" / "a.txt", "a")
        (tmp_path / "a.txt").symlink_to(elsewhere / "a.txt")
        write_text(tmp_path / "a.txt", "b")
        assert (tmp_path / "link").is_symlink() and (tmp_path / "a.txt").is_symlink()
        assert (elsewhere / "config.json").exists() and (elsewhere / "a.txt").read_text() == "b"
    finally:
        shutil.rmtree(elsewhere)
    real, calls = Path.replace, []

    def other_file_system(self, target):  # a folder inside that is mounted by itself
        calls.append(target)
        if len(calls) == 1:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return real(self, target)

    monkeypatch.setattr(Path, "replace", other_file_system)
    write_folder(tmp_path / "out", lambda aside: (aside / "a").write_text("whole"))
    assert files_of(tmp_path / "out") == {"a": b"whole"} and len(calls) == 2


BAD_OUTPUTS = {
    "/proc/a.html": "cannot be written",
    "/dev/null": "is a device",
    "file.txt/a.html": "cannot be written",
    "folder": "is a folder; name a file",
    "a" * 256: "cannot be written",
    "new/" + "a" * 256: "cannot be written",
}


@pytest.mark.parametrize("name", BAD_OUTPUTS, ids=lambda name: name[:20])
def test_an_output_that_cannot_be_written_is_known_before(name, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.txt").write_text("mine")
    with pytest.raises((ValueError, OSError), match=BAD_OUTPUTS[name]):
        check_output(tmp_path / name)
    with pytest.raises(OSError, match="could not save"):
        write_text(tmp_path / name, "a")
    assert {path.name for path in tmp_path.iterdir()} <= {"folder", "file.txt", "new"}
    assert (tmp_path / "file.txt").read_text() == "mine" and not Path("/dev/null").is_file()


def test_what_can_be_written_passes_and_leaves_nothing(tmp_path):
    for name in ("a" * 255, "deep/er/a.html", "file.txt", "file.txt"):
        check_output(tmp_path / name)
        assert name == "file.txt" or not list(tmp_path.iterdir())
        if name == "file.txt":
            write_text(tmp_path / name, "mine")
    check_output(tmp_path / "new" / "folder", folder=True)
    with pytest.raises(ValueError, match="is a file; name a folder"):
        check_output(tmp_path / "file.txt", folder=True)
    write_text(tmp_path / ("ä" * 127 + "b"), "a name of 255 bytes")
    assert {path.read_text() for path in tmp_path.iterdir()} == {"mine", "a name of 255 bytes"}


def test_a_result_that_finds_no_room_lies_in_the_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    target = tmp_path / "file.txt" / "a.md"
    (tmp_path / "file.txt").write_text("mine")
    with pytest.raises(OSError, match="the result lies in (.*)") as error:
        write_or_rescue(target, lambda path: write_text(path, "long work"))
    assert Path(str(error.value).rpartition(" ")[2]).read_text() == "long work"
    with full_disk(2), pytest.raises(OSError, match="could not save .*a.md"):
        write_or_rescue(target, lambda path: write_text(path, "long work"))
    assert len(list(tmp_path.glob("dreamllm-edu-*"))) == 1


def test_memory_is_counted_in_the_unit_of_the_system(monkeypatch):
    for system, unit in (("linux", 2**10), ("darwin", 2**20)):
        with monkeypatch.context() as patch:
            patch.setattr(dreamllm_edu.training.trainer.sys, "platform", system)
            patch.setattr(resource, "getrusage", lambda who, unit=unit: SimpleNamespace(ru_maxrss=300 * unit))
            assert resident_memory_mb() == 300
    monkeypatch.setitem(sys.modules, "resource", None)
    assert resident_memory_mb() == 0, "Windows has no such module"
