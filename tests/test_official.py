"""The official code's numbers, on the tiny model that computed them."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, DDIMScheduler, DDPMScheduler
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModel

from dreamllm_edu.documents.document import Document, Dream
from dreamllm_edu.documents.pictures import picture_tensor
from dreamllm_edu.models.dreamllm.config import DreamLLMConfig
from dreamllm_edu.models.dreamllm.model import DreamLLM
from dreamllm_edu.models.dreamllm.official import (
    ControlledUNet,
    OfficialDreamLLM,
    conversation_row,
    interleaved_document,
    interleaved_row,
    official_config,
    pair_row,
    paper_config,
    parameters_of,
    picture_pair_row,
    query_states,
    read_file,
    replace_blocks,
    text_to_image,  # importing it gives both classes their from_official
)
from dreamllm_edu.models.dreamllm.processor import DreamLLMProcessor
from dreamllm_edu.parts.denoising import denoising_loss
from dreamllm_edu.parts.diffusion import sample_latents
from dreamllm_edu.sequences import collate
from dreamllm_edu.training.recipe import recipe_of

GOLDEN = Path(__file__).parent / "golden"
SCALARS = json.loads((GOLDEN / "golden.json").read_text())["scalars"]
META = json.loads((GOLDEN / "golden.json").read_text())["meta"]
QUIRKS = json.loads((GOLDEN / "quirks.json").read_text(encoding="utf8"))  # the table of notebook 15
VARIANTS = {
    "stage2": {},
    "stage2_minsnr": {"snr_gamma": 5.0},
    "stage2_minsnr_off": {},
    "stage2_vpred": {"prediction_type": "v_prediction"},
    "stage2_vpred_minsnr": {"prediction_type": "v_prediction", "snr_gamma": 5.0},
    "stage2_offset_perturb": {"noise_offset": 0.1, "input_perturbation": 0.1},
    "stage2_cfgdrop": {"condition_dropout": 0.5},
}


def arrays(group):
    found = np.load(GOLDEN / "arrays" / f"{group}.npz")
    return {name.replace("__", "/"): torch.from_numpy(found[name]) for name in found.files}


def official(**config):
    return DreamLLM.from_official(GOLDEN / "checkpoint", base=GOLDEN, **config)


def draws_of(found):
    """The draws of a golden group as arguments of `forward`."""
    kinds = {name.split("_", 1)[1]: value for name, value in found.items() if name.startswith("draw")}
    normal = [value for name, value in sorted(found.items()) if name.startswith("draw") and name.endswith("randn_like")]
    given = {"vae_noise": kinds["vae_eps"], "noise": normal[0], "timesteps": kinds["randint"]}
    if len(normal) > 1:
        given |= {"perturbation_noise": normal[1], "offset_noise": kinds["randn"]}
    if "bernoulli" in kinds:
        given["condition_drop_mask"] = kinds["bernoulli"].bool()
    return given


def batch():
    found = arrays("batch")
    return {
        "input_ids": found["input_ids"],
        "attention_mask": found["attention_mask"],
        "labels": found["labels"],
        "pixel_values": found["images"],
        "target_pixel_values": found["images_dm"],
    }


def close(mine, theirs, tolerance=1e-5):
    assert mine.shape == theirs.shape, f"{tuple(mine.shape)} is not {tuple(theirs.shape)}"
    assert (mine - theirs).abs().max() <= tolerance, f"differs by {(mine - theirs).abs().max():.2e}"


def real(found, inputs):
    """Only at real tokens: what a padded position says is nobody's business."""
    return found[inputs["attention_mask"].bool()]


@pytest.mark.parametrize("group", VARIANTS)
def test_training_forward(group):
    found, inputs = arrays(group), batch()
    model = official(compat="official", **VARIANTS[group]).train()
    out = model(**inputs, **draws_of(found))
    close(real(out.last_hidden_state, inputs), real(found["last_hidden"], inputs))
    dropped = draws_of(found).get("condition_drop_mask", torch.zeros(3, dtype=torch.bool))
    with torch.no_grad():
        close(torch.where(dropped.view(-1, 1, 1), model.null_condition(), out.conditions), found["cond_out"])
    for name, mine in (("lm_loss", out.lm_loss), ("vm_loss", out.image_loss), ("loss", out.loss)):
        assert mine.item() == pytest.approx(SCALARS[group][name]["value"], abs=1e-5), name
    if "logits" in found:
        close(real(out.logits, inputs), real(found["logits"], inputs))


def test_where_the_original_has_a_bug_the_default_differs():
    """Quirks 20 and 21: computed here by hand from the official arrays, as it should be."""
    found = arrays("stage2_vpred_minsnr")
    signal = arrays("scheduler")["alphas_cumprod"][found["timesteps"]].view(-1, 1, 1, 1)
    velocity = signal.sqrt() * found["noise_used"] - (1 - signal).sqrt() * found["latents"]
    snr = (signal / (1 - signal)).flatten()
    wanted = ((found["unet_out"] - velocity).square().mean((1, 2, 3)) * snr.clamp(max=5) / (snr + 1)).mean().item()
    out = official(**VARIANTS["stage2_vpred_minsnr"]).train()(**batch(), **draws_of(found))
    assert out.image_loss.item() == pytest.approx(wanted, abs=1e-5)
    assert abs(wanted - SCALARS["stage2_vpred_minsnr"]["vm_loss"]["value"]) > 0.1

    found, model = arrays("stage2_cfgdrop"), official(**VARIANTS["stage2_cfgdrop"]).train()
    out, drop = (
        model(**batch(), **draws_of(found)),
        found["draw3/bernoulli" if "draw3/bernoulli" in found else "draw3_bernoulli"].bool(),
    )
    null = model.condition_projector(
        arrays("t2i")["negative_prompt_embeds"]
    )  # the null condition of inference, as the official code makes it there
    conditions = torch.where(drop.view(-1, 1, 1), null, out.conditions)
    wanted = denoising_loss(
        model.unet, model.scheduler, found["latents"], conditions, found["noise_used"], found["timesteps"]
    ).item()
    assert out.image_loss.item() == pytest.approx(wanted, abs=1e-5)
    assert abs(wanted - SCALARS["stage2_cfgdrop"]["vm_loss"]["value"]) > 5e-5


def trainable(model):
    for name, p in model.named_parameters():
        p.requires_grad_(name.split(".")[0] not in model.frozen_parts)
    return model


def official_name(name):
    for ours, theirs in (
        ("language_model.", ""),
        ("visual_projector.linear.", "model.clip_vision_embedding.projector.projector."),
        ("dream_queries.weight", "model.dream_embedding.dream_queries"),
        ("condition_projector.linear.", "stable_diffusion_head.projector.projector."),
    ):
        if name.startswith(ours):
            return theirs + name[len(ours):]


@pytest.mark.parametrize("group", [g for g in META["grad_norms"] if g in VARIANTS])
def test_gradient_of_every_trainable_tensor(group):
    model = trainable(official(compat="official", **VARIANTS[group]).train())
    found = arrays(group)
    model(**batch(), **draws_of(found)).loss.backward()
    mine = {official_name(name): p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert mine.keys() == META["grad_norms"][group].keys()
    for name, norm in META["grad_norms"][group].items():
        assert mine[name].norm().item() == pytest.approx(norm, rel=1e-4), name
    for name, theirs in ((n[5:], v) for n, v in found.items() if n.startswith("grad/")):
        ours = mine[name].view_as(theirs)
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm(), name


def test_one_step_of_adamw():
    model = trainable(official(compat="official").train())
    found, after = arrays("stage2"), arrays("stage2_adamw")
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0
    )
    model(**batch(), **draws_of(found)).loss.backward()
    optimizer.step()
    mine = {official_name(name): p.detach() for name, p in model.named_parameters()}
    for name, theirs in ((n[6:], v) for n, v in after.items() if n.startswith("after/")):
        ours = mine[name].view_as(
            theirs
        )  # where a gradient is nearly 0, Adam's first step is its sign: a few entries may differ
        assert ((ours - theirs).abs() > 1e-4).float().mean() < 0.002, name
    again = model(**batch(), **draws_of(found))
    for name, value in (
        ("loss_after", again.loss),
        ("lm_loss_after", again.lm_loss),
        ("vm_loss_after", again.image_loss),
    ):
        assert value.item() == pytest.approx(SCALARS["stage2_adamw"][name]["value"], rel=1e-4), name


@pytest.mark.parametrize("group, given", [("eval_with_images_dm", True), ("eval_without_images_dm", False)])
def test_evaluation_forward(group, given):
    inputs = batch()
    if not given:
        del inputs["target_pixel_values"]
    with torch.no_grad():
        out = official(compat="official")(**inputs)
    assert out.image_loss is None and out.loss.item() == pytest.approx(SCALARS[group]["loss"]["value"], abs=1e-5)
    close(real(out.logits, inputs), real(arrays(group)["logits"], inputs))


def test_evaluation_measures_the_image_loss_by_default():
    """Quirk 16."""
    with torch.no_grad():
        out = official()(**batch(), **draws_of(arrays("stage2")))
    assert out.image_loss.item() == pytest.approx(SCALARS["stage2"]["vm_loss"]["value"], abs=1e-5)


def test_the_default_splices_queries_whether_or_not_targets_are_given():
    inputs, model = batch(), official()
    del inputs["target_pixel_values"]
    with torch.no_grad():
        close(real(model(**inputs).logits, inputs), real(arrays("eval_with_images_dm")["logits"], inputs))


@pytest.mark.parametrize("text, ids", META["tokenizer_cases"].items())
def test_tokenizer(text, ids):
    assert DreamLLMProcessor.from_official(GOLDEN / "checkpoint", base=GOLDEN).tokenizer.encode(text) == ids


def test_the_round_trip_is_bit_exact(tmp_path):
    official().save_official(tmp_path / "again")
    from dreamllm_edu.models.dreamllm.official import read_file
    for file in ("model.safetensors", "clip_vision_embedding.bin", "dream_embedding.bin", "stable_diffusion_head.bin"):
        ours, theirs = read_file(tmp_path / "again" / file), read_file(GOLDEN / "checkpoint" / file)
        assert ours.keys() == theirs.keys(), file
        assert all(ours[k].dtype == theirs[k].dtype and torch.equal(ours[k], theirs[k]) for k in theirs), file
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == json.loads(
        (GOLDEN / "checkpoint" / "config.json").read_text()
    )


@pytest.fixture(scope="module")
def processor():
    return DreamLLMProcessor.from_official(GOLDEN / "checkpoint", base=GOLDEN)


P1, P2 = META["t2i_prompts"]["P1"], META["t2i_prompts"]["P2"]
PROMPTS = {
    "single_1": ([P1], "right"),
    "single_2": ([P2], "right"),
    "batch_left": ([P1, P2], "left"),
    "batch_right": ([P1, P2], "right"),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_prompt_embeddings(case, processor):
    texts, side = PROMPTS[case]
    states = query_states(official(compat="official"), processor, [Document([t]) for t in texts], side)
    close(states, arrays("t2i")[f"{case}/prompt_embeds"])


def test_by_default_a_prompt_does_not_depend_on_its_neighbour(processor):
    model, both = official(), [Document([P1]), Document([P2])]
    alone = torch.cat([query_states(model, processor, [d]) for d in both])
    for side in ("left", "right"):
        close(query_states(model, processor, both, side), alone)
    assert (arrays("t2i")["batch_right/prompt_embeds"] - alone).abs().max() > 1, "the official numbers show the quirk"


def test_the_null_condition(processor):
    """Quirk 20: one null condition here, in training and at inference."""
    model, found = official(), arrays("t2i")
    close(query_states(model, processor, [Document([""])]), found["negative_prompt_embeds"])
    with torch.no_grad():
        for mode in (True, False):
            close(model.train(mode).null_condition(), model.condition_projector(found["negative_prompt_embeds"]))


SAMPLERS = {
    "ddpm_cfg7.5": {},
    "ddpm_cfg1.0": {"guidance_scale": 1.0},
    "ddpm_cfg7.5_rescale0.7": {"guidance_rescale": 0.7},
    "ddpm_cfg7.5_negprompt": {"negative_prompt": "the dog"},
    "ddim_cfg7.5": {},
}


@pytest.mark.parametrize("case", SAMPLERS)
def test_five_step_pipelines(case, processor):
    found, model = arrays("pipeline"), official(compat="official")
    sampler = (
        DDIMScheduler.from_config(model.scheduler.config, set_alpha_to_one=False) if case.startswith("ddim") else None
    )
    latents = text_to_image(
        model,
        processor,
        [Document([P1])],
        num_inference_steps=5,
        noise=found["latents_init"],
        sampler=sampler,
        generator=torch.Generator().manual_seed(5),
        **SAMPLERS[case],
    )
    close(latents, found[f"{case}/final_latents"], 5e-4)
    if f"{case}/decoded_raw" in found:
        with torch.no_grad():
            close(
                model.vae.decode(latents / model.vae.config.scaling_factor).sample, found[f"{case}/decoded_raw"], 5e-4
            )


def test_greedy_tokens(processor):
    found, prompt = (
        arrays("generate"),
        Document([Image.open(GOLDEN / "images/im1.png"), "what is in this image?"], given=2),
    )
    assert processor.layout.encode(prompt.parts, 2, add_eos=False).input_ids == found["prompt_ids"][0].tolist()
    model = official()
    written = model.generate(prompt, processor, max_new_tokens=12, max_pictures=0)
    assert written.texts[1:] == [processor.decode(found["output_ids"][0, found["prompt_ids"].shape[1]:].tolist())]
    with torch.no_grad():
        close(model(input_ids=found["prompt_ids"], pixel_values=found["images"]).logits[:, -1], found["next_logits"])
        seen = model.embed(found["prompt_ids"], model.encode_images(found["images"]))
        ids = model.language_model.generate(
            inputs_embeds=seen, attention_mask=torch.ones(seen.shape[:2]), max_new_tokens=12, do_sample=False
        )
    assert ids[0].tolist() == found["output_ids"][0, found["prompt_ids"].shape[1]:].tolist()


def test_scheduler():
    found, scheduler = arrays("scheduler"), DDPMScheduler.from_config(official().scheduler.config)
    close(scheduler.alphas_cumprod, found["alphas_cumprod"], 1e-7)
    for steps in (5, 20, 50, 100, 150):
        scheduler.set_timesteps(steps)
        assert (
            scheduler.timesteps.tolist()
            == found[f"timesteps/{steps}" if f"timesteps/{steps}" in found else f"timesteps_{steps}"].tolist()
        )


RECORDS = META["builder_inputs"]


def picture(name):
    return Image.open(GOLDEN / name)


def record(name):
    r = RECORDS[name]
    return interleaved_document(r["text_list"], [picture(i) for i in r["images"]], r["matched_text_index"])


def builder_row(case, layout):
    """The `Sequence` of a golden builder case."""
    limit = META["builder_cases"][case]["model_max_length"]
    layout.max_length = limit
    flags, pair = META["builder_cases"][case]["flags"], RECORDS["pair"]
    if case.startswith("pair"):
        return pair_row(layout, pair["text"], picture(pair["image"]), "creation" in case)
    if case == "image_image_pair":
        return picture_pair_row(layout, picture(RECORDS[case]["source"]), picture(RECORDS[case]["target"]))
    if case == "conversation_vicuna":
        turns = [
            ["user", [picture(RECORDS["conversation_images"]["image"]), "\nwhat is in this image?"]],
            ["assistant", ["there is one dog."]],
            ["user", ["please draw a tree."]],
            ["assistant", ["sure, here is a tree. ", picture(RECORDS["conversation_images"]["dream"])]],
        ]
        return conversation_row(layout, turns, compat="official")
    if case == "instruct_interleaved":
        parts = record(case).parts
        return conversation_row(layout, [["user", [RECORDS[case]["user"]]], ["assistant", parts]])
    name = next(
        n
        for n in ("interleaved_a", "interleaved_b", "interleaved_two_images_on_one_text", "interleaved_text_too_long")
        if case.startswith(n)
    )
    if name == "interleaved_text_too_long":
        name = "interleaved_a"
    return interleaved_row(
        layout, record(name), creation=not flags.get("comprehension_only"), comprehension=not flags.get("creation_only")
    )


@pytest.mark.parametrize("case", META["builder_cases"])
def test_builder(case, processor):
    found, row = arrays("builder"), builder_row(case, processor.layout)
    assert row.input_ids == found[f"{case}/input_ids"].tolist()
    theirs = found[f"{case}/labels"].tolist()
    assert row.labels[1:] == theirs[1:], "of <s> nothing is ever asked"
    for key, make, pictures in (
        ("images", processor.pixels, row.images),
        ("images_dm", lambda p: torch.stack([picture_tensor(x, 16) for x in p]), row.targets),
    ):
        if f"{case}/{key}" in found:
            close(make(pictures), found[f"{case}/{key}"], 1e-6)
        else:
            assert not pictures, key


@pytest.mark.parametrize(
    "case", META["truncate_and_replace"], ids=lambda c: f"{len(c['input_ids'])} at {c['truncate']}"
)
def test_replace_blocks(case):
    blocks = {int(k): v for k, v in case["replacement"].items()}
    found = replace_blocks(case["input_ids"], case["input_ids"], blocks, case["truncate"], compat="official")
    assert found == (case["out_ids"], case["out_labels"])
    right = {
        (5, 20): [1, 5, 100, 101, 102, 6, 7],
        (5, 6): [1, 5, 100, 101, 102, 6],
        (5, 5): [1, 5, 100, 101, 102],
        (6, 5): [1, 5, 8],
        (6, 4): [1, 2, 3, 4],
        (8, 8): [1, 2, 3, 4, 5, 6],
    }[len(case["input_ids"]), case["truncate"]]
    ours, labels = replace_blocks(case["input_ids"], case["input_ids"], blocks, case["truncate"])
    assert ours == right and labels == [-100 if t in (100, 101, 102) else t for t in right]
    if case["truncate"] == 5 and len(right) == 5:
        assert replace_blocks([1, 5, 9, 9], [1, 5, 9, 9], blocks, 5, compat="official")[0] == right, (
            "at the limit nothing more is cut"
        )


def test_our_own_layout_agrees_where_nothing_is_cut(processor):
    """The default encoding of an interleaved document is the official one."""
    layout, document = processor.layout, record("interleaved_a")
    ours, theirs = layout.encode(document.parts), interleaved_row(layout, document)
    assert ours.input_ids == theirs.input_ids and ours.labels[1:] == theirs.labels[1:]


SINGLES = {
    "stage1_comprehension": ["pair_comprehension"],
    "stage1_creation": ["pair_creation"],
    "mixed_pairs": ["pair_comprehension", "pair_creation"],
    "sft_conversation": ["conversation_vicuna"],
}


@pytest.mark.parametrize("group", SINGLES)
def test_other_training_batches(group, processor):
    rows, found = [builder_row(case, processor.layout) for case in SINGLES[group]], arrays(group)
    inputs = collate(rows, processor.layout.id["<pad>"])
    images, targets = [p for r in rows for p in r.images], [p for r in rows for p in r.targets]
    if images:
        inputs["pixel_values"] = processor.pixels(images)
    if targets:
        inputs["target_pixel_values"] = torch.stack([picture_tensor(p, 16) for p in targets])
    out = official(compat="official").train()(**inputs, **(draws_of(found) if targets else {}))
    close(real(out.last_hidden_state, inputs), real(found["last_hidden"], inputs))
    for name, mine in (("lm_loss", out.lm_loss), ("vm_loss", out.image_loss), ("loss", out.loss)):
        theirs = SCALARS[group][name]["value"]
        assert (0.0 if mine is None else mine.item()) == pytest.approx(theirs, abs=1e-5), name


def test_text_alone_trains_without_a_dummy_picture(monkeypatch):
    """The official code sends a black picture through CLIP and adds 0 times the result (quirk 23)."""
    model, found = official().train(), arrays("text_only")
    monkeypatch.setattr(model.vision_encoder, "forward", lambda *a, **k: pytest.fail("CLIP was asked"))
    ids = found["input_ids"]
    out = model(input_ids=ids, labels=ids)
    close(out.last_hidden_state, found["last_hidden"])
    close(out.logits, found["logits"])
    assert out.image_loss is None and out.lm_loss.item() == pytest.approx(
        SCALARS["text_only"]["lm_loss"]["value"], abs=1e-5
    )


def test_prompt_with_a_picture(processor):
    found = arrays("t2i")
    ids = found["image_prompt/input_ids"][0].tolist()
    before, after = (processor.decode(part) for part in (ids[1:ids.index(361)], ids[ids.index(365) + 1:]))
    prompt = Document(
        [
            before,
            Image.open(
                next(
                    p
                    for p in (GOLDEN / "images").iterdir()
                    if torch.equal(processor.pixels([Image.open(p)]), found["image_prompt/images"])
                )
            ),
            after,
        ]
    )
    assert processor.layout.encode(prompt.parts, 3, add_eos=False).input_ids == ids
    close(query_states(official(compat="official"), processor, [prompt]), found["image_prompt/prompt_embeds"])


# ---------------------------------------------------------------- quirks that no golden array shows

def test_a_generator_draws_in_the_official_order():
    """Quirk 18: VAE noise, noise, offset, perturbation, time steps, dropout; one seed gives all of them."""
    for group, seed in (
        ("stage2", 1234),
        ("stage2_offset_perturb", 1234),
        ("stage2_cfgdrop", 4),
        ("stage2_minsnr", 14),
    ):
        out = official(compat="official", **VARIANTS[group]).train()(
            **batch(), generator=torch.Generator().manual_seed(seed)
        )
        assert out.image_loss.item() == pytest.approx(SCALARS[group]["vm_loss"]["value"], abs=1e-5), group


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 10.0)])
def test_which_loss_reaches_which_part(weights):
    """Quirk 14: words train the queries and the picture trains the visual projector, for both stand in one causal
    sequence."""
    theirs = META["facts"][f"grad norms with loss weights lm={weights[0]} vm={weights[1]}"]
    model = trainable(official(compat="official", lm_loss_weight=weights[0], image_loss_weight=weights[1]).train())
    model(**batch(), **draws_of(arrays("stage2"))).loss.backward()
    mine = {official_name(n): p.grad for n, p in model.named_parameters() if p.requires_grad}
    for name, norm in theirs.items():
        assert mine[name].norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-7), name


def test_special_ids_come_from_the_config(processor):
    """Quirk 26: their order in the list says nothing."""
    ids = META["special_tokens"]["additional_special_tokens"]
    named = {
        "<dream_start>": "<dream_start>",
        "<dream_end>": "<dream_end>",
        "<image_start>": "<im_start>",
        "<image_end>": "<im_end>",
        "<image_patch>": "<im_patch>",
        "<dream_query>": "<im_patch>",
    }
    assert all(processor.layout.id[ours] == ids[theirs] for ours, theirs in named.items())
    assert processor.layout.id["<pad>"] == META["special_tokens"]["[PAD]"]


def test_the_models_ids_come_from_the_config_too(tmp_path):
    """Quirk 26, and without the dictionary from the tokenizer's file."""
    folder = copy(tmp_path)
    def exchange(raw):
        ids = raw["special_tokens2ids_dict"]["additional_special_tokens"]
        ids["<dream_start>"], ids["<im_start>"] = ids["<im_start>"], ids["<dream_start>"]
    break_config(exchange)(folder)
    assert (official_config(folder, GOLDEN).dream_start_id, official_config(folder, GOLDEN).image_start_id) == (
        361,
        363,
    )
    break_config(lambda raw: raw.pop("special_tokens2ids_dict"))(folder)
    assert (official_config(folder, GOLDEN).dream_start_id, official_config(folder, GOLDEN).image_start_id) == (
        363,
        361,
    )
    (folder / "added_tokens.json").unlink()
    with pytest.raises(ValueError, match="no id of"):
        official_config(folder, GOLDEN)


def test_pictures_without_labels_train():
    """Quirk 22: there the official code stops with an AttributeError."""
    inputs = batch()
    del inputs["labels"]
    out = official().train()(**inputs, **draws_of(arrays("stage2")))
    assert out.lm_loss is None and out.loss.item() == pytest.approx(
        10 * SCALARS["stage2"]["vm_loss"]["value"], abs=1e-4
    )


def test_a_missing_picture_is_an_error_and_shifts_nothing():
    """Quirk 13: there every later picture of the batch lands in the wrong document."""
    inputs = batch()
    with pytest.raises(ValueError, match=r"3 image blocks in the tokens \(by document: \[2, 1\]\), but 2 pictures"):
        official()(**{**inputs, "pixel_values": inputs["pixel_values"][1:]})
    with pytest.raises(
        ValueError, match=r"3 dream blocks in the tokens \(by document: \[2, 1\]\), but 2 target pictures"
    ):
        official().train()(**{**inputs, "target_pixel_values": inputs["target_pixel_values"][1:]})


def test_initialisation():
    """Quirk 25: queries from N(0, 0.02), projectors as PyTorch draws a linear layer."""
    model = DreamLLM(official().config)
    assert 0.017 < DreamLLM(paper_like(model.config)).dream_queries.weight.std().item() < 0.023
    bound = 1 / model.config.text_config.hidden_size ** 0.5
    weight = model.condition_projector.linear.weight
    assert weight.abs().max() <= bound and weight.std().item() == pytest.approx(bound / 3 ** 0.5, rel=0.1)


def paper_like(config):
    """The tiny model with as many queries as the paper's."""
    return DreamLLMConfig(**{**config.to_dict(), "num_queries": 64})


def test_two_configurations_share_nothing():
    """Quirk 30: there two models in one process share their plugins' options."""
    one, other = DreamLLMConfig(), DreamLLMConfig()
    one.scheduler_config["prediction_type"], one.unet_config["sample_size"], one.text_config.hidden_size = (
        "sample",
        1,
        2,
    )
    assert other.scheduler_config == {} and other.unet_config == {} and other.text_config.hidden_size != 2


def test_every_picture_of_a_prompt_counts(processor):
    """Quirk 35: there only the first one is looked at."""
    model, one, two = official(), picture("images/im0.png"), picture("images/im1.png")
    ask = lambda last: query_states(model, processor, [Document(["a", one, "and", last])])
    assert (ask(one) - ask(two)).abs().max() > 0.01


def test_several_pictures_of_one_prompt_stand_side_by_side(processor):
    """Quirk 36: a, a, b, b."""
    model, noise = official(), torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).expand(4, -1, -1, -1)
    sampler = DDIMScheduler.from_config(model.scheduler.config)
    latents = text_to_image(
        model,
        processor,
        [Document([P1]), Document([P2])],
        num_inference_steps=2,
        num_images_per_prompt=2,
        noise=noise,
        sampler=sampler,
    )
    close(latents[0], latents[1], 1e-4)
    close(latents[2], latents[3], 1e-4)
    assert (latents[0] - latents[2]).abs().max() > 1e-4


# ---------------------------------------------------------------- other layouts, and bad checkpoints

def copy(tmp_path, leave_out=()):
    folder = tmp_path / "copy"
    shutil.copytree(GOLDEN / "checkpoint", folder, ignore=lambda *_: leave_out)
    return folder


def same(one, other):
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values()))


def test_the_fsdp_layout(tmp_path):
    """Quirk 27: one pytorch_model.bin with the plugins inside."""
    plugins = {
        "model.clip_vision_embedding.": "clip_vision_embedding.bin",
        "model.dream_embedding.": "dream_embedding.bin",
        "stable_diffusion_head.": "stable_diffusion_head.bin",
    }
    folder = copy(tmp_path, [*plugins.values(), "model.safetensors"])
    everything = read_file(GOLDEN / "checkpoint/model.safetensors")
    for prefix, file in plugins.items():
        everything |= {prefix + name: t for name, t in read_file(GOLDEN / "checkpoint" / file).items()}
    torch.save(everything, folder / "pytorch_model.bin")
    same(DreamLLM.from_official(folder, base=GOLDEN), official())


@pytest.mark.parametrize("end", ["safetensors", "bin"])
def test_shards(tmp_path, end):
    folder, tensors = copy(tmp_path, ["model.safetensors"]), read_file(GOLDEN / "checkpoint/model.safetensors")
    stem, weight_map = ("model" if end == "safetensors" else "pytorch_model"), {}
    for i, half in enumerate((list(tensors)[:9], list(tensors)[9:])):
        file = f"{stem}-0000{i + 1}-of-00002.{end}"
        part = {name: tensors[name] for name in half}
        save_file(part, folder / file) if end == "safetensors" else torch.save(part, folder / file)
        weight_map |= dict.fromkeys(half, file)
    (folder / f"{stem}.{end}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    same(DreamLLM.from_official(folder, base=GOLDEN), official())


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("touched"),))


def break_config(change):
    def broken(folder):
        raw = json.loads((folder / "config.json").read_text())
        change(raw)
        (folder / "config.json").write_text(json.dumps(raw))
    return broken


BROKEN = {
    "another model": (break_config(lambda raw: raw.update(model_type="llama")), "a model of type 'llama'"),
    "no queries": (lambda folder: (folder / "dream_embedding.bin").unlink(), "dream_embedding.bin: no such file"),
    "cut off": (
        lambda folder: (folder / "stable_diffusion_head.bin").write_bytes(
            (folder / "stable_diffusion_head.bin").read_bytes()[:1000]
        ),
        "damaged|not opened",
    ),
    "cut off llm": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000]),
        "damaged or cut off",
    ),
    "evil": (
        lambda folder: torch.save({"dream_queries": Evil()}, folder / "dream_embedding.bin"),
        "holds more than tensors",
    ),
    "small vocabulary": (break_config(lambda raw: raw.update(vocab_size=362)), "special token has id 367"),
    "queries": (
        break_config(lambda raw: raw["plugins_init_kwargs"]["dream_embedding"].update(num_dream_queries=8)),
        "other shape, such as dream_queries",
    ),
    "no clip": (
        break_config(
            lambda raw: raw["plugins_init_kwargs"]["clip_vision_embedding"].update(
                clip_vision_model_name_or_path="openai/none"
            )
        ),
        "base=FOLDER",
    ),
    "foreign tensor": (
        lambda folder: torch.save(
            {"dream_queries": torch.zeros(1, 4, 64), "more": torch.zeros(1)}, folder / "dream_embedding.bin"
        ),
        "no place in DreamLLM",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), "missing or no JSON"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_bad_checkpoints(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = copy(tmp_path)
    BROKEN[case][0](folder)
    with pytest.raises(ValueError, match=BROKEN[case][1]) as error:
        DreamLLM.from_official(folder, base=GOLDEN)
    assert "\n" not in str(error.value) and not (tmp_path / "touched").exists()


def test_picture_pairs_and_records_that_do_not_fit():
    with pytest.raises(ValueError, match="ascending"):
        interleaved_document(["a", "b"], [None, None], [1, 0])
    with pytest.raises(ValueError, match="there are 2 texts"):
        interleaved_document(["a", "b"], [None], [2])


def test_conversations_learn_when_to_draw(processor):
    """Quirk 5."""
    turns, start = (
        [("user", ["draw it."]), ("assistant", ["here: ", picture("images/im0.png")])],
        processor.layout.id["<dream_start>"],
    )
    assert start in conversation_row(processor.layout, turns).labels
    assert start not in conversation_row(processor.layout, turns, compat="official").labels


def test_dropout_is_off_unless_asked():
    """Quirk 19."""
    assert (
        official().config.condition_dropout == 0.0 and official(condition_dropout=0.25).config.condition_dropout == 0.25
    )
    out = official().train()(
        **batch(), **{k: v for k, v in draws_of(arrays("stage2")).items()}, generator=torch.Generator().manual_seed(0)
    )
    assert out.image_loss.item() == pytest.approx(SCALARS["stage2"]["vm_loss"]["value"], abs=1e-5)


def test_a_prompt_longer_than_the_context(processor):
    """Quirk 24."""
    with pytest.raises(ValueError, match="long story: part 0 ends at token .*the context holds 512"):
        query_states(official(), processor, [Document(["a cat. " * 300], name="long story")])


def test_the_target_is_the_picture_that_is_read(processor):
    """Quirk 37: there the target is mirrored now and then, the picture that CLIP reads is not."""
    one = picture("images/im0.png").resize((28, 28))
    inputs = processor([Document([one])])
    seen = inputs["pixel_values"][0] * torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1) + torch.tensor(
        [0.48145466, 0.4578275, 0.40821073]
    ).view(3, 1, 1)
    target, small = (
        (inputs["target_pixel_values"][0] + 1) / 2,
        torch.nn.functional.interpolate(seen[None], 16, mode="area")[0],
    )
    assert (small - target).abs().mean() < (small.flip(-1) - target).abs().mean() / 2


def sdxl_config():
    """The tiny model with a U-Net that wants a pooled text vector and sizes, as SDXL's does."""
    config = official().config
    unet = {
        **config.unet_config,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 24,
    }
    return DreamLLMConfig(**{**config.to_dict(), "unet_config": unet})


def test_sdxl_conditioning(processor):
    """Quirk 31: trains, its pooled projector too, and draws with guidance."""
    torch.manual_seed(0)
    model = trainable(DreamLLM(sdxl_config()).train())
    model(**batch(), generator=torch.Generator().manual_seed(0)).loss.backward()
    assert (
        model.pooled_projector.linear.weight.shape == (24, 32)
        and model.pooled_projector.linear.weight.grad.abs().max() > 0
    )
    assert (
        model.added_conditions(torch.zeros(2, 4, 32))["added_cond_kwargs"]["time_ids"].tolist()
        == [[16, 16, 0, 0, 16, 16]] * 2
    )
    drawn = model.eval().generate(Document(["a cat", Dream()]), processor, max_new_tokens=0, num_inference_steps=2)
    assert drawn.pictures[0].size == (16, 16)
    assert official().added_conditions(torch.zeros(2, 4, 32)) == {}


def test_controlnet_steers_and_gradients_pass():
    model, words = official(), torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    torch.manual_seed(0)
    control = ControlNetModel.from_unet(model.unet, conditioning_embedding_out_channels=(8, 8)).requires_grad_(False)
    for p in control.controlnet_mid_block.parameters():
        p.normal_(0, 0.1)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    loss = lambda unet: denoising_loss(unet, model.scheduler, noise, words, noise.flip(0), torch.tensor([300, 700]))
    plain, off, on = (
        loss(model.unet),
        loss(ControlledUNet(model.unet, control, torch.zeros(1, 3, 16, 16), 0.0)),
        loss(ControlledUNet(model.unet, control, torch.zeros(2, 3, 16, 16))),
    )
    assert torch.equal(plain, off) and (on - plain).abs() > 1e-4
    on.backward()
    assert words.grad.abs().max() > 0
    for guidance in (1.0, 3.0):
        out = sample_latents(
            ControlledUNet(model.unet, control, torch.zeros(1, 3, 16, 16)),
            model.scheduler,
            words.detach(),
            words.detach()[:1] * 0,
            guidance,
            2,
            noise=noise,
        )
        assert out.shape == noise.shape and out.isfinite().all()


def test_every_quirk_names_a_test_of_this_file():
    assert [row["number"] for row in QUIRKS] == list(range(1, 38))
    for row in QUIRKS:
        assert row["test"].startswith("test_") and callable(globals().get(row["test"])), row


def test_full_size_counts():
    """Llama-7B: Touvron et al. 2023; U-Net and VAE: Stable Diffusion 2.1-base; CLIP-L/14's vision tower: each as its
    own library's class counts it."""
    parts, trained = parameters_of(paper_config(), recipe_of("paper").stages)
    assert parts["language_model"] - 2 * 8 * 4096 == 6_738_415_616
    assert (parts["unet"], parts["vae"], parts["vision_encoder"]) == (865_910_724, 83_653_863, 303_179_776)
    adapters = 1024 * 4096 + 4096 + 64 * 4096 + 4096 * 1024
    assert trained == {
        "1-alignment": adapters,
        "2-interleaved": adapters + parts["language_model"],
        "3-instruction": adapters + parts["language_model"],
    }


def test_our_own_layout_where_it_differs(processor):
    """Quirks 4 and 10: a request is learned, and a long text is cut inside, never a block."""
    layout, one = processor.layout, picture("images/im0.png")
    wish = layout.encode(["a cat", one], given=1)
    assert (
        layout.id["<dream_start>"] in wish.labels
        and layout.id["<dream_start>"] not in pair_row(layout, "a cat", one, True).labels
    )
    layout.max_length = 20
    ours, theirs = (
        make(record("interleaved_a"))
        for make in (lambda d: layout.encode(d.parts), lambda d: interleaved_row(layout, d))
    )
    assert len(ours.input_ids) <= 20 and ours.input_ids[:14] == theirs.input_ids[:14] and not ours.images


def changed_tensors(folder, change):
    tensors = read_file(folder / "model.safetensors")
    save_file({k: v.contiguous() for k, v in change(tensors).items()}, folder / "model.safetensors")


def test_grouped_query_attention(tmp_path):
    folder = copy(tmp_path)
    break_config(lambda raw: raw.update(num_key_value_heads=2))(folder)
    changed_tensors(folder, lambda t: {k: v[:32] if "k_proj" in k or "v_proj" in k else v for k, v in t.items()})
    model = DreamLLM.from_official(folder, GOLDEN)
    assert model.language_model.config.num_key_value_heads == 2 and torch.isfinite(model.train()(**batch()).loss)
    model.save_official(tmp_path / "again")
    same(DreamLLM.from_official(tmp_path / "again", GOLDEN), model)


def test_half_precision_and_tied_checkpoints_come_back_as_they_were(tmp_path):
    folder = copy(tmp_path)
    break_config(lambda raw: raw.update(tie_word_embeddings=True, torch_dtype="bfloat16"))(folder)
    changed_tensors(folder, lambda t: {k: v.bfloat16() for k, v in t.items() if k != "lm_head.weight"})
    model = DreamLLM.from_official(folder, GOLDEN)
    assert model.language_model.lm_head.weight is model.language_model.model.embed_tokens.weight
    model.save_official(tmp_path / "again")
    ours, theirs = (read_file(f / "model.safetensors") for f in (tmp_path / "again", folder))
    assert ours.keys() == theirs.keys() and all(
        ours[k].dtype == theirs[k].dtype and torch.equal(ours[k], theirs[k]) for k in theirs
    )


def test_options_in_the_checkpoint_are_read(tmp_path):
    folder = copy(tmp_path)
    break_config(lambda raw: raw["plugins_init_kwargs"]["stable_diffusion_head"].update(snr_gamma=5.0))(folder)
    break_config(lambda raw: raw.update(loss_scale_schedule="l1_norm"))(folder)
    out = DreamLLM.from_official(folder, GOLDEN).train()(**batch(), **draws_of(arrays("stage2_minsnr")))
    theirs = {k: v["value"] for k, v in SCALARS["stage2_minsnr"].items()}
    assert out.image_loss.item() == pytest.approx(theirs["vm_loss"], abs=1e-5)
    assert out.loss.item() == pytest.approx(theirs["loss"] / 11, abs=1e-5)


def test_parts_beside_the_checkpoint_need_no_base(tmp_path):
    same(DreamLLM.from_official(GOLDEN / "checkpoint"), official())
    assert DreamLLMProcessor.from_official(GOLDEN / "checkpoint").num_patches == 4


def test_bf16_trains():
    model, inputs = official().bfloat16(), batch()
    assert torch.isfinite(model.train()(**inputs, generator=torch.Generator().manual_seed(0)).loss)


def test_unsupported_projectors_are_named(tmp_path):
    folder = copy(tmp_path)
    break_config(
        lambda raw: raw["plugins_init_kwargs"]["clip_vision_embedding"].update(projector_type="mlp", projector_depth=2)
    )(folder)
    with pytest.raises(ValueError, match="projector of type 'mlp' and depth 2"):
        DreamLLM.from_official(folder, GOLDEN)


def test_more_tokens_than_the_context():
    """Quirk 24."""
    with pytest.raises(ValueError, match="600 tokens, the context holds 512"):
        official()(input_ids=torch.ones(1, 600, dtype=torch.long))


def test_a_model_of_ours_has_no_official_form(tmp_path):
    with pytest.raises(ValueError, match="only a model from from_official"):
        DreamLLM(sdxl_config()).save_official(tmp_path)


def test_the_methods_are_there_without_further_imports(tmp_path):
    """Whoever imports only the class can load, write, generate."""
    code = f"""
from dreamllm_edu.model import DreamLLM
from dreamllm_edu.tokenization import DreamLLMProcessor
from dreamllm_edu.documents import Document
model = DreamLLM.from_official({str(GOLDEN / 'checkpoint')!r}, base={str(GOLDEN)!r})
processor = DreamLLMProcessor.from_official({str(GOLDEN / 'checkpoint')!r}, base={str(GOLDEN)!r})
import pathlib
pathlib.Path('out').mkdir()
pathlib.Path('out/tokenizer.model').write_text('mine')
model.save_official('out')
print(type(model.generate(Document(['a cat']), processor, max_new_tokens=1, max_pictures=0)).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "Document", done.stderr[-500:]
    assert (tmp_path / "out/model.safetensors").exists() and (tmp_path / "out/tokenizer.model").read_text() == "mine", (
        "what lay there stays"
    )


def test_the_official_behaviour_is_a_class_of_its_own(tmp_path):
    """No branch on `compat` is left in `DreamLLM`; the class says what it computes, also after saving."""
    theirs = official(compat="official")
    assert type(theirs) is OfficialDreamLLM and theirs.config.compat == "official" and type(official()) is DreamLLM
    assert type(OfficialDreamLLM.from_official(GOLDEN / "checkpoint", base=GOLDEN)) is OfficialDreamLLM
    with pytest.raises(ValueError, match="is an OfficialDreamLLM: make it with DreamLLM.from_official"):
        DreamLLM(theirs.config)
    with pytest.raises(ValueError, match="OfficialDreamLLM is made for 'official'"):
        OfficialDreamLLM(official().config)
    theirs.save_pretrained(tmp_path / "saved")
    for loaded in (DreamLLM.from_pretrained(tmp_path / "saved"), AutoModel.from_pretrained(tmp_path / "saved")):
        assert type(loaded) is OfficialDreamLLM
        same(loaded, theirs)
    with torch.no_grad():
        assert loaded(**batch()).image_loss is None, "quirk 16"
    source = "".join(
        (Path(module.__file__)).read_text()
        for module in (sys.modules[DreamLLM.__module__], sys.modules[DreamLLM.generate.__module__])
    )
    assert "== \"official\"" not in source
