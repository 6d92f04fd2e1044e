"""Two ways to the same result: where they differ, one of them is wrong."""
import copy
import pickle
import signal
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image
from torch import nn

from dreamllm_edu.documents.document import Document, Dream
from dreamllm_edu.models.dreamllm.family import DreamLLMFamily
from dreamllm_edu.parts.diffusion import decode_latents, sample_latents, scheduler_config, to_pictures
from dreamllm_edu.parts.tokenizer import encode_text
from dreamllm_edu.sequences import Layout
from dreamllm_edu.training.checkpoint import last_checkpoint
from dreamllm_edu.training.features import FeatureStore, fill_store, fingerprint, row_of
from dreamllm_edu.training.fit import fit
from dreamllm_edu.training.recipe import corpora_of
from dreamllm_edu.training.report import read_log
from dreamllm_edu.training.stage import Settings, Stage, set_trainable
from dreamllm_edu.training.trainer import Trainer, train_part

from conftest import CONTEXT, PATCHES, QUERIES, lessons, make_tiny, picture

STEPS, GUIDANCE = 3, 2.0
DREAM_START, QUERY, DREAM_END, IMAGE_START, PATCH, IMAGE_END = range(3, 9)
DREAM = [DREAM_START] + [QUERY] * QUERIES + [DREAM_END]
LOOK = [IMAGE_START] + [PATCH] * PATCHES + [IMAGE_END]


def far(a, b):
    """Largest difference of two pictures in grey levels."""
    return int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max())


def far_from(a, b):
    """Root of the mean squared difference of two tensors."""
    return (a - b).square().mean().sqrt().item()


def same(a, b, levels=1):
    """Two documents: texts equal, pictures equal within one grey level (sums are added in another order, then
    rounded)."""
    assert [type(p) is str for p in a.parts] == [type(p) is str for p in b.parts], (a.text, b.text)
    for one, two in zip(a.parts, b.parts):
        assert one == two if isinstance(one, str) else far(one, two) <= levels


# ---------------------------------------------------------------- generation

@torch.no_grad()
def slow_generate(model, processor, prompt, max_new_tokens, seed, max_pictures=4):
    """The same job written a second time: no cache, no batch; the whole sequence goes through `forward` again for
    every token."""
    ids, seen, wishes = [1], [], 0
    noise = torch.Generator().manual_seed(seed)
    null = model(input_ids=torch.tensor([[1] + DREAM])).conditions

    def forward():
        return model(input_ids=torch.tensor([ids]), pixel_values=processor.pixels(seen) if seen else None)

    def draw():
        ids.extend(DREAM)
        z = torch.randn(1, 4, 8, 8, generator=noise)
        drawn = to_pictures(
            decode_latents(
                model.vae,
                sample_latents(model.unet, model.scheduler, forward().conditions[-1:], null, GUIDANCE, STEPS, noise=z),
            )
        )[0]
        ids.extend(LOOK)
        seen.append(drawn)
        return drawn

    parts = []
    for part in prompt.parts:
        if isinstance(part, str):
            ids += processor.tokenizer.encode(part, add_special_tokens=False)
            parts.append(part)
        elif isinstance(part, Dream):
            parts.append(draw())
            wishes += 1
        else:
            ids += LOOK
            seen.append(part)
            parts.append(part)
    words, count = [], 0

    def close():
        if words:
            parts.append(processor.decode(words))
            words.clear()

    while True:
        logits = forward().logits[0, -1]
        for i in range(9):
            if i != 2 and (i != DREAM_START or wishes >= max_pictures):
                logits[i] = -torch.inf
        token = int(logits.argmax())
        if token == DREAM_START:
            close()
            parts.append(draw())
            wishes += 1
        elif token == 2 or count >= max_new_tokens:
            close()
            return Document(parts, len(prompt.parts))
        else:
            words.append(token)
            ids.append(token)
            count += 1


PROMPTS = [
    Document(["cat:"]),
    Document(["dog:", Dream(), " two"]),
    Document([picture(4), "what a red cat", picture(5)]),
    Document(["cat:", " a red cat", picture(1), " and"]),
]


@pytest.mark.parametrize("which", range(len(PROMPTS)))
def test_cached_generation_is_uncached_generation(which, trained, processor):
    fast = trained.generate(
        PROMPTS[which], processor, max_new_tokens=14, num_inference_steps=STEPS, guidance_scale=GUIDANCE, seed=5
    )
    slow = slow_generate(trained, processor, PROMPTS[which], 14, seed=5)
    same(fast, slow)
    assert len(fast.parts) > len(PROMPTS[which].parts) and fast.given == len(PROMPTS[which].parts)


def test_the_trained_model_decides_for_pictures_itself(trained, processor):
    """Or the equivalences above would compare texts only."""
    written = trained.generate(PROMPTS[0], processor, max_new_tokens=14, num_inference_steps=STEPS, seed=5)
    assert written.parts[1] == " a red cat" and len(written.pictures) >= 2 and "<" not in "".join(written.texts)


def test_a_batch_of_prompts_is_the_prompts_one_by_one(trained, processor):
    """A document's seed follows from its place in the list; neighbours, padding and waiting change nothing."""
    options = dict(max_new_tokens=14, num_inference_steps=STEPS, guidance_scale=GUIDANCE)
    together = trained.generate(PROMPTS, processor, seed=3, **options)
    for place, (prompt, found) in enumerate(zip(PROMPTS, together)):
        same(found, trained.generate(prompt, processor, seed=3 + 7919 * place, **options))


def test_sampled_words_do_not_depend_on_the_batch_either(trained, processor):
    options = dict(max_new_tokens=10, num_inference_steps=1, temperature=1.5, top_p=0.95, max_pictures=2)
    for seed in range(4):
        together = trained.generate(PROMPTS[:3], processor, seed=seed, **options)
        for place, (prompt, found) in enumerate(zip(PROMPTS, together)):
            same(found, trained.generate(prompt, processor, seed=seed + 7919 * place, **options))


def test_the_same_seed_repeats_and_another_does_not(trained, processor):
    ask = lambda **options: trained.generate(
        Document(["cat:", Dream()]), processor, max_new_tokens=0, num_inference_steps=STEPS, **options
    ).pictures[0]
    assert ask(seed=1).tobytes() == ask(seed=1).tobytes()
    assert far(ask(seed=1), ask(seed=2)) > 10
    one, two = (ask(generator=torch.Generator().manual_seed(4)) for _ in range(2))
    assert one.tobytes() == two.tobytes()


def test_pictures_depend_on_the_words_and_on_guidance(trained, processor):
    """So that `equal within one grey level` above says something."""
    ask = lambda text, **options: trained.generate(
        Document([text, Dream()]), processor, max_new_tokens=0, num_inference_steps=STEPS, **options
    ).pictures[0]
    assert far(ask("cat:"), ask("dog:")) > 2
    assert far(ask("cat:", guidance_scale=1.0), ask("cat:", guidance_scale=8.0)) > 2


def test_what_was_drawn_is_seen(trained, processor):
    """The picture that is fed back changes what is written after it, exactly as a given picture at the same place
    would."""
    first = trained.generate(
        Document(["cat:", " a red cat", Dream()]), processor, max_new_tokens=0, num_inference_steps=STEPS, seed=1
    ).pictures[0]
    on = trained.generate(
        Document(["cat:", " a red cat", Dream()]),
        processor,
        max_new_tokens=6,
        max_pictures=1,
        num_inference_steps=STEPS,
        seed=1,
    )
    given = trained.generate(
        Document(["cat:", " a red cat", first], given=2), processor, max_new_tokens=6, max_pictures=0
    )
    assert on.parts[2].tobytes() == first.tobytes() and on.parts[3:] == given.parts[3:]
    with torch.no_grad():
        one, two = (
            trained(**{k: processor(Document([p, "what"], 1))[k] for k in ("input_ids", "pixel_values")}).logits[0, -1]
            for p in (first, picture(9))
        )
    assert not torch.allclose(one, two, atol=1e-3), "or else pictures would not matter to words at all"


def test_bounds_are_kept(trained, processor):
    for tokens, pictures in ((0, 4), (1, 0), (3, 0), (8, 1), (14, 2)):
        told = []
        written = trained.generate(
            Document(["cat:"]),
            processor,
            max_new_tokens=tokens,
            max_pictures=pictures,
            num_inference_steps=1,
            callback=lambda i, part, told=told: told.append(part),
        )
        assert len(written.pictures) <= pictures and sum(isinstance(part, str) for part in told) <= tokens
        assert "".join(p for p in told if isinstance(p, str)) == "".join(written.texts[1:]), (
            "what is streamed is what comes back"
        )
        assert [p.tobytes() for p in told if isinstance(p, Image.Image)] == [p.tobytes() for p in written.pictures]


def test_guidance_is_the_formula(tiny):
    """out = null + s (cond - null), checked against two calls of the U-Net; a scale of 1 must be the condition alone,
    0 the null alone."""
    condition, null, noise = torch.randn(2, QUERIES, 24), torch.randn(1, QUERIES, 24), torch.randn(2, 4, 8, 8)
    one_step = lambda c, s: sample_latents(tiny.unet, tiny.scheduler, c, null, s, 1, noise=noise)
    alone, nothing = one_step(condition, 1.0), one_step(null.expand_as(condition), 1.0)
    assert torch.allclose(one_step(condition, 0.0), nothing, atol=1e-5)
    assert torch.allclose(one_step(condition, 3.0), nothing + 3 * (alone - nothing), atol=1e-4), (
        "one DDIM step is linear in the U-Net's answer"
    )
    assert not torch.allclose(alone, nothing, atol=1e-3)


SAMPLERS = (
    "DDIM",
    "DDPM",
    "EulerDiscrete",
    "EulerAncestralDiscrete",
    "HeunDiscrete",
    "PNDM",
    "UniPCMultistep",
    "DPMSolverMultistep",
    "DEISMultistep",
)
SAMPLERS_TO_PURE_NOISE = (
    "DDIM",
    "DDPM",
    "EulerDiscrete",
    "EulerAncestralDiscrete",
    "UniPCMultistep",
    "DPMSolverMultistep",
)


class Knowing:
    """A U-Net that knows the picture `z` and is right about whatever it is shown."""
    config = SimpleNamespace(sample_size=8, in_channels=4)

    def __init__(self, z, scheduler):
        self.z, self.scheduler, self.spread = z, scheduler, []

    def __call__(self, x, t, encoder_hidden_states):
        self.spread.append(x.std().item())
        level = torch.as_tensor(np.interp(float(t), np.arange(1000), self.scheduler.alphas_cumprod)).float()
        a, s = level.sqrt(), (1 - level).sqrt()
        noise = (x - a * self.z) / s
        return SimpleNamespace(
            sample=noise if self.scheduler.config.prediction_type == "epsilon" else a * noise - s * self.z
        )


def test_the_levels_of_the_knowing_network_are_read_right():
    scheduler = DDPMScheduler(**scheduler_config("epsilon"))
    z, noise, t = *torch.randn(2, 1, 4, 8, 8), torch.tensor([600])
    assert torch.allclose(Knowing(z, scheduler)(scheduler.add_noise(z, noise, t), t, None).sample, noise, atol=1e-4)


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")
@pytest.mark.parametrize(
    "kind, predicts", [(k, "epsilon") for k in SAMPLERS] + [(k, "v_prediction") for k in SAMPLERS_TO_PURE_NOISE]
)
def test_every_sampler_leads_a_network_that_knows_the_picture_there(kind, predicts):
    """Whether its start and what the network is shown are scaled as it wants them; and again from another picture,
    noised part of the way."""
    scheduler, words = DDPMScheduler(**scheduler_config(predicts)), torch.zeros(2, 2, 8)
    z, other, noise = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    knowing = Knowing(z, scheduler)
    walk = lambda **more: sample_latents(
        knowing,
        scheduler,
        words,
        words,
        1.0,
        20,
        torch.Generator().manual_seed(1),
        noise=noise,
        sampler=getattr(diffusers, f"{kind}Scheduler").from_config(scheduler.config),
        **more,
    )
    assert far_from(walk(), z) < 0.05
    assert 0.8 < min(knowing.spread) and max(knowing.spread) < 1.25, (
        "z and noise spread by 1, so all that is shown does; who knows z forgives a wrong start"
    )
    if kind in ("HeunDiscrete", "PNDM"):
        with pytest.raises(ValueError, match="cannot start at a picture"):
            walk(latents=other, strength=0.5)
    else:
        assert far_from(walk(latents=other, strength=0.5), z) < 0.05


# ---------------------------------------------------------------- training inputs

def fixed_draws(n):
    g = torch.Generator().manual_seed(9)
    return {
        "noise": torch.randn(n, 4, 8, 8, generator=g),
        "timesteps": torch.tensor([100, 700, 300, 999][:n]),
        "condition_drop_mask": torch.tensor([True, False, False, False][:n]),
    }


def test_features_given_are_pictures_given(processor, tiny):
    batch = processor(lessons())
    draws = fixed_draws(3)
    vae_noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    pictures = tiny(**batch, **draws, vae_noise=vae_noise)
    words = {k: batch[k] for k in ("input_ids", "attention_mask", "labels")}
    features = tiny(
        **words,
        **draws,
        image_features=tiny.encode_images(batch["pixel_values"]),
        latents=tiny.encode_latents(batch["target_pixel_values"], vae_noise),
    )
    for name in ("loss", "lm_loss", "image_loss", "logits", "conditions"):
        assert torch.equal(pictures[name], features[name]), name


def test_the_feature_store_holds_what_the_frozen_parts_compute(processor, tiny, world, tmp_path):
    family, (edits,) = DreamLLMFamily(tiny, processor), corpora_of(EDITS, world=small(world))
    store = FeatureStore(tmp_path, fingerprint(family), resident=True)
    assert fill_store(store, family, [edits], batch=3, views=2, read_last=True)["broken"] == 0
    rows = [row_of(record, family.layout, True) for record in edits.read("edits")][:4]
    read, drawn = [[p for row in rows for p in getattr(row, role)] for role in ("images", "targets")]
    pictures = [p.open() for p in read]
    assert torch.allclose(
        store.read("features", read[::-1]).float(), tiny.encode_images(processor.pixels(pictures[::-1])), atol=2e-3
    ), "half precision, no more"
    views = torch.stack([store.read("features", read, 2, torch.Generator().manual_seed(i)) for i in range(20)])
    assert [len(views[:, n].float().unique(dim=0)) for n in range(len(read))] == [2] * len(read), (
        "the picture and one altered copy"
    )
    posterior = tiny.vae.encode(
        torch.stack([torch.tensor(np.asarray(p.open())).permute(2, 0, 1) / 127.5 - 1 for p in drawn])
    ).latent_dist
    mean, std = (store.read("moments", drawn).float() / tiny.vae.config.scaling_factor).unbind(1)
    assert torch.allclose(mean, posterior.mean, atol=2e-3) and torch.allclose(std, posterior.std, rtol=2e-3, atol=1e-3)


def test_padding_changes_nothing(processor, tiny):
    one, two = lessons()
    draws = fixed_draws(3)
    together = tiny(**processor([one, two]), **draws, vae_noise=torch.zeros(3, 4, 8, 8))
    alone = tiny(**processor(two), **{k: v[2:] for k, v in draws.items()}, vae_noise=torch.zeros(1, 4, 8, 8))
    n = alone.logits.shape[1]
    assert torch.allclose(together.logits[1, :n], alone.logits[0], atol=1e-4)
    assert torch.allclose(together.conditions[2:], alone.conditions, atol=1e-4)


def test_losses_by_hand(processor, tiny):
    """The joint loss, recomputed token by token and picture by picture."""
    batch, draws = processor(lessons()), fixed_draws(3)
    out = tiny(**batch, **draws, vae_noise=torch.zeros(3, 4, 8, 8))
    losses = [
        -out.logits[b, t].log_softmax(-1)[batch["labels"][b, t + 1]]
        for b in range(2)
        for t in range(out.logits.shape[1] - 1)
        if batch["labels"][b, t + 1] != -100
    ]
    assert torch.allclose(out.lm_loss, torch.stack(losses).mean(), atol=1e-5)
    latents, scheduler, errors = (
        tiny.encode_latents(batch["target_pixel_values"], torch.zeros(3, 4, 8, 8)),
        DDPMScheduler(**tiny.config.scheduler_config),
        [],
    )
    conditions = torch.where(draws["condition_drop_mask"].view(-1, 1, 1), tiny.null_condition(), out.conditions)
    for i in range(3):
        alpha = scheduler.alphas_cumprod[draws["timesteps"][i]]
        z, noise = latents[i:i + 1], draws["noise"][i:i + 1]
        said = tiny.unet(
            alpha.sqrt() * z + (1 - alpha).sqrt() * noise,
            draws["timesteps"][i],
            encoder_hidden_states=conditions[i : i + 1],
        ).sample
        errors.append((said - (alpha.sqrt() * noise - (1 - alpha).sqrt() * z)).square().mean())
    assert torch.allclose(out.image_loss, torch.stack(errors).mean(), rtol=1e-4)
    assert torch.allclose(out.loss, out.lm_loss + 10 * out.image_loss, rtol=1e-6), "lm : image = 1 : 10"


def test_a_query_sees_the_words_before_it_and_no_others(processor, tiny):
    ask = lambda text, after: tiny(**processor(Document([text, picture(1), after])), **fixed_draws(1)).conditions
    assert torch.equal(ask("a red cat", " end"), ask("a red cat", " dog"))
    assert not torch.allclose(ask("a red cat", " end"), ask("a blue cat", " end"), atol=1e-4)


# ---------------------------------------------------------------- gradients

def test_gradient_reaches_the_conditions_through_the_frozen_unet(processor, tiny):
    """From the denoising loss alone: queries, condition projector, language model, and the projector of the picture
    that came before."""
    batch = processor(Document([picture(2), "a red cat", picture(1)], given=2))
    out = tiny(**batch, **{**fixed_draws(1), "condition_drop_mask": torch.tensor([False])})
    out.image_loss.backward()
    for part in ("dream_queries", "condition_projector", "language_model", "visual_projector"):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in getattr(tiny, part).parameters()), (
            f"no gradient reaches {part}"
        )
    for part in tiny.frozen_parts:
        assert all(p.grad is None and not p.requires_grad for p in getattr(tiny, part).parameters()), (
            f"{part} is frozen, but gets a gradient"
        )


def test_the_gradient_is_the_slope(processor, tiny):
    """Against a finite difference of the loss along the gradient: a detach anywhere on the way would show."""
    tiny = tiny.double()
    batch, draws = (
        processor(Document(["a red cat", picture(1)], given=1)),
        {k: v.double() if v.is_floating_point() else v for k, v in fixed_draws(1).items()},
    )
    draws["condition_drop_mask"] = torch.tensor([False])
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weights = [
        tiny.dream_queries.weight,
        tiny.condition_projector.linear.weight,
        tiny.language_model.model.layers[0].mlp.up_proj.weight,
    ]

    def loss():
        scheduler = tiny.scheduler
        states = tiny(
            input_ids=batch["input_ids"], image_features=tiny.encode_images(batch["pixel_values"].double())
        ).conditions
        alpha = scheduler.alphas_cumprod[draws["timesteps"]].double().view(-1, 1, 1, 1)
        said = tiny.unet(
            alpha.sqrt() * latents + (1 - alpha).sqrt() * draws["noise"],
            draws["timesteps"],
            encoder_hidden_states=states,
        ).sample
        return (said - (alpha.sqrt() * draws["noise"] - (1 - alpha).sqrt() * latents)).square().mean()

    out = tiny(
        input_ids=batch["input_ids"],
        image_features=tiny.encode_images(batch["pixel_values"].double()),
        latents=latents,
        **draws,
    )
    slopes = torch.autograd.grad(out.image_loss, weights)
    for weight, slope in zip(weights, slopes):
        step = 1e-4 * slope / slope.norm()
        with torch.no_grad():
            weight += step
            up = loss()
            weight -= 2 * step
            down = loss()
            weight += step
        assert torch.allclose((up - down) / 2e-4, slope.norm(), rtol=2e-2), "the gradient is not the slope of the loss"


def small(world, names=("cat", "dog", "rose", "bus", "owl", "key", "drum", "lemon", "red apple", "hammer")):
    """The emoji world with few concepts, and no scenes unless asked for."""
    few = copy.copy(world)
    few.concepts = [c for c in world.concepts if c["name"] in names]
    return few


STAGE = Stage(
    "test",
    ("visual_projector", "dream_queries", "condition_projector"),
    {"pairs": 0.5, "edits": 0.5},
    1e-3,
    4,
    4,
    warmup=1,
    ema_decay=0.9,
)


EDITS = Stage("edits", (), {"edits": 1.0}, 1e-3, 1, 4)



def train_stage(model, processor, stage, world, folder=None, seed=0, **options):
    """One stage on a small world; the rows of its log."""
    settings = Settings(lanes=4, seed=seed, precision="bf16", betas=(0.9, 0.99), weight_decay=0.01)
    family = DreamLLMFamily(model, processor)
    return Trainer.of_stage(
        family, stage, corpora_of(stage, world=world), folder, settings, progress=False, **options
    ).train()


def test_a_stage_changes_what_it_trains_and_nothing_else(processor, tiny, world):
    before = {k: v.clone() for k, v in tiny.state_dict().items()}
    history = train_stage(tiny, processor, STAGE, small(world))
    changed = {name.split(".")[0] for name, value in tiny.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == set(STAGE.trains) and len(history) == 4 and all(np.isfinite(row["image"]) for row in history)


@pytest.mark.parametrize("steps", [0, -1])
def test_a_stage_of_no_steps_is_refused(steps, processor, tiny, world):
    with pytest.raises(ValueError, match=f"stage test: {steps} steps; give at least 1"):
        train_stage(tiny, processor, STAGE, small(world), steps=steps)


def test_a_stage_of_texts_alone_needs_no_pictures(processor, tiny, world):
    stage = Stage("words", ("language_model",), {"definitions": 1.0}, 1e-3, 2, 4, warmup=1, ema_decay=0.9)
    history = train_stage(tiny, processor, stage, world)
    assert len(history) == 2 and all(np.isfinite(row["lm"]) and "image" not in row for row in history)


def test_weight_decay_is_what_the_settings_say(processor, world):
    """With a learning rate of 0.1 and no gradient to speak of, decay 0.5 takes a twentieth of a weight in one step."""
    moved = []
    for decay in (0.0, 0.5):
        model = make_tiny()
        before = model.dream_queries.weight.detach().clone()
        stage = Stage("test", ("dream_queries",), {"pairs/draw": 1.0}, 0.1, 1, 4, warmup=0, ema_decay=0.0)
        family = DreamLLMFamily(model, processor)
        settings = Settings(lanes=4, weight_decay=decay)
        Trainer.of_stage(
            family, stage, corpora_of(stage, world=small(world)), settings=settings, progress=False
        ).train()
        moved.append((before, model.dream_queries.weight.detach()))
    torch.testing.assert_close(moved[0][1] - moved[1][1], 0.1 * 0.5 * moved[0][0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("trains", [("dream_queries",), ("language_model", "visual_projector"), ()])
def test_set_trainable(trains, tiny):
    set_trainable(tiny, Stage("any", trains, {}, 1e-3, 1, 1, lm_loss_weight=2.0, image_loss_weight=3.0))
    assert {name.split(".")[0] for name, p in tiny.named_parameters() if p.requires_grad} == set(trains)
    assert (tiny.config.lm_loss_weight, tiny.config.image_loss_weight) == (1.0, 10.0), (
        "a stage's weights are not the model's"
    )


def test_condition_dropout_trains_the_null_condition(processor, tiny):
    batch, draws = processor(lessons()), fixed_draws(3)
    losses = [
        tiny(
            **batch, **{**draws, "condition_drop_mask": torch.tensor([d] * 3)}, vae_noise=torch.zeros(3, 4, 8, 8)
        ).image_loss
        for d in (False, True)
    ]
    assert not torch.allclose(*losses), "a dropped condition must be another one"
    tiny.train()
    tiny.config.condition_dropout = 0.25
    masks = torch.cat(
        [tiny.draws(torch.zeros(8, 4, 8, 8), torch.Generator().manual_seed(i), None, None, None)[2] for i in range(200)]
    )
    assert 0.2 < masks.float().mean() < 0.3
    tiny.eval()
    assert tiny.draws(torch.zeros(8, 4, 8, 8), torch.Generator().manual_seed(0), None, None, None)[2] is None, (
        "no dropout in evaluation"
    )


# ---------------------------------------------------------------- stopping and going on

class Stop:
    """A loss during whose step `at` Ctrl-C comes, once: the run stops after `at` steps."""
    def __init__(self, loss, at):
        self.loss, self.at = loss, at

    def __call__(self, model, step, generator):
        if step + 1 == self.at:
            self.at = None
            signal.raise_signal(signal.SIGINT)
        return self.loss(model, step, generator)


class Counting(nn.Module):
    """A little net whose batch norm counts as it trains."""
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 1))

    def forward(self, x):
        return self.net(x)


def noisy_loss(model, step, generator):
    x = torch.randn(16, 3, generator=generator)
    return {"loss": (model(x).float() - x.sum(1, keepdim=True) - 1).square().mean()}


def tiny_loss(processor):
    batch = processor(lessons())
    return lambda model, step, generator: (
        lambda out: {"loss": out.loss, "lm_loss": out.lm_loss, "image_loss": out.image_loss}
    )(model(**batch, generator=generator))


def losses_of(history):
    measured = ("seconds", "samples_per_second", "tokens_per_second", "memory_mb")
    return [{k: v for k, v in row.items() if k not in measured} for row in history]


@pytest.mark.parametrize("precision", ["bf16", "no"])
def test_resumed_training_is_uninterrupted_training(precision, processor, tmp_path):
    """DreamLLM, bit for bit: weights, losses; stopped between two saves, and after one."""
    options = dict(
        steps=6, learning_rate=1e-3, seed=3, warmup=2, ema_decay=0.9, precision=precision, save_every=2, progress=False
    )
    loss = tiny_loss(processor)
    whole, history = train_part(make_tiny(), loss, folder=tmp_path / "whole", **options)
    interrupted = Stop(loss, 3)
    with pytest.raises(KeyboardInterrupt, match="3 of 6"):
        train_part(make_tiny(), interrupted, folder=tmp_path / "parts", **options)
    interrupted.at, other = 4, make_tiny()
    with torch.no_grad():
        for value in other.parameters():
            value.add_(1)  # another start
    with pytest.raises(ValueError, match="another starting weights"):
        train_part(other, interrupted, folder=tmp_path / "parts", **options)
    with pytest.raises(KeyboardInterrupt, match="4 of 6"):
        train_part(make_tiny(), interrupted, folder=tmp_path / "parts", **options)
    again, again_history = train_part(make_tiny(), loss, folder=tmp_path / "parts", **options)
    assert losses_of(again_history) == losses_of(history) and [row["step"] for row in history] == list(range(6))
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in whole.state_dict().items())
    assert not all(torch.equal(v, make_tiny().state_dict()[k]) for k, v in whole.state_dict().items()), (
        "something must have been learned"
    )
    assert losses_of(read_log(tmp_path / "parts" / "log.jsonl")) == losses_of(history)


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
@pytest.mark.parametrize("at", [1, 2, 7, None])
def test_a_net_that_counts_resumes_too(ema_decay, at, tmp_path):
    """Batch norm's running mean and variance are no parameters, but the judge is worth nothing without them.
    `at=None`: the second call finds all steps made."""
    options = dict(steps=9, learning_rate=1e-2, warmup=2, ema_decay=ema_decay, precision="no", progress=False)
    whole, history = train_part(Counting(), noisy_loss, **options)
    if at is None:
        train_part(Counting(), noisy_loss, folder=tmp_path, **options)
    else:
        with pytest.raises(KeyboardInterrupt):
            train_part(Counting(), Stop(noisy_loss, at), folder=tmp_path, **options)
    again, again_history = train_part(Counting(), noisy_loss, folder=tmp_path, **options)
    assert losses_of(history) == losses_of(again_history)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), f"{name} differs after resuming"
    assert not torch.equal(whole.net[1].running_mean, torch.zeros(5)), "the average has counts of its own"


def test_all_stages_resume(processor, world, tmp_path):
    """Two stages, stopped inside the second."""
    few = small(world)
    second = Stage("second", STAGE.trains + ("language_model",), {"pairs": 1.0}, 1e-3, 4, 4, warmup=1, ema_decay=0.9)

    def job(model, folder, **options):
        return [
            losses_of(train_stage(model, processor, stage, few, folder / stage.name, 2, **options))
            for stage in (STAGE, second)
        ]

    def stop(step, trainer):
        if trainer.task.name == "stage second" and step == 0:
            signal.raise_signal(signal.SIGINT)

    whole, again = make_tiny(), make_tiny()
    histories = job(whole, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt, match="stage second stopped after 2 of 4"):
        job(make_tiny(), tmp_path / "parts", on_step=stop)
    assert job(again, tmp_path / "parts") == histories
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in whole.state_dict().items())


def test_a_finished_run_is_not_trained_further(tmp_path):
    options = dict(steps=4, learning_rate=1e-2, folder=tmp_path, precision="no", progress=False)
    one, _ = train_part(Counting(), noisy_loss, **options)

    def never(*_):
        raise AssertionError("a finished run made another step")

    two, history = train_part(Counting(), never, **options)
    assert len(history) == 4 and torch.equal(one.net[0].weight, two.net[0].weight)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_and_changes_nothing(bad, tmp_path):
    net, seen = Counting(), []

    def loss(model, step, generator):
        value = noisy_loss(model, step, generator)["loss"]
        seen.append({k: v.clone() for k, v in model.state_dict().items() if "num" not in k and "running" not in k})
        return {"loss": value * bad if step == 3 else value}

    with pytest.raises(FloatingPointError, match="step 3"):
        train_part(net, loss, 6, 1e-2, folder=tmp_path, save_every=2, precision="no", progress=False)
    assert len(seen) == 4
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in seen[-1].items()), "the bad step changed the weights"
    assert last_checkpoint(tmp_path)[1]["step"] == 2, "the last checkpoint stays"


def test_a_gradient_that_is_not_finite_stops_and_changes_nothing():
    net = nn.Linear(1, 1)
    before = net.weight.detach().clone()
    with pytest.raises(FloatingPointError):
        train_part(
            net,
            lambda m, s, g: {"loss": (m(torch.zeros(1, 1)) * 0).sum().sqrt()},
            2,
            1e-2,
            precision="no",
            progress=False,
        )
    assert torch.equal(before, net.weight)


def test_training_leaves_the_model_in_full_precision(processor, tiny):
    """After bf16 training the model must answer as a freshly loaded one would."""
    loss = tiny_loss(processor)
    train_part(tiny, loss, 1, 1e-3, precision="bf16", progress=False)
    fresh = make_tiny()
    fresh.load_state_dict(tiny.state_dict())
    batch, draws = processor(lessons()), {**fixed_draws(3), "vae_noise": torch.zeros(3, 4, 8, 8)}
    assert torch.equal(tiny.eval()(**batch, **draws).logits, fresh(**batch, **draws).logits)


def test_the_average_answers_with_its_own_weights(processor):
    """Also the second time the same model is trained: its copy must not call the original's forward."""
    model, loss = make_tiny(), tiny_loss(processor)
    for _ in range(2):
        average, _ = fit(model, loss, 3, 1e-2, warmup=1, ema_decay=0.99, progress=False)
    fresh = make_tiny()
    fresh.load_state_dict(average.state_dict())
    batch, draws = processor(lessons()), {**fixed_draws(3), "vae_noise": torch.zeros(3, 4, 8, 8)}
    assert torch.equal(average.eval()(**batch, **draws).logits, fresh(**batch, **draws).logits)
    assert not torch.equal(average(**batch, **draws).logits, model.eval()(**batch, **draws).logits)


def test_learning_learns(processor):
    """The whole chain in one number: the denoising loss of two documents falls when only queries and condition
    projector may move."""
    model = make_tiny()
    set_trainable(model, Stage("any", ("dream_queries", "condition_projector"), {}, 1e-3, 1, 1))
    batch, draws = (
        processor(lessons()),
        {**fixed_draws(3), "vae_noise": torch.zeros(3, 4, 8, 8), "condition_drop_mask": torch.tensor([False] * 3)},
    )
    _, history = fit(
        model,
        lambda m, s, g: {"loss": m(**batch, **draws).image_loss},
        30,
        3e-2,
        warmup=3,
        progress=False,
    )
    assert history[-1]["loss"] < history[0]["loss"] - 0.01


def test_context_is_what_the_tests_think(processor, tiny):
    assert (tiny.config.num_patches, tiny.config.num_queries, processor.max_length) == (PATCHES, QUERIES, CONTEXT)


def test_a_model_that_is_training_writes_as_one_that_is_not_and_goes_on_training(processor):
    model, ask = make_tiny(), dict(max_new_tokens=6, num_inference_steps=1, temperature=1.0, seed=3)
    calm = model.generate(Document(["cat:"]), processor, **ask)
    model.language_model.gradient_checkpointing_enable()
    model.train()
    assert model.generate(Document(["cat:"]), processor, **ask) == calm
    assert model.training and not model.unet.training
    with pytest.raises(ValueError):
        model.generate(Document([]), processor)
    assert model.training


def test_a_piece_of_a_long_list_is_written_as_in_the_whole_list(trained, processor):
    prompts, ask = (
        [Document([text]) for text in ("cat:", "dog:", "two")],
        dict(max_new_tokens=5, max_pictures=0, temperature=1.5, seed=3),
    )
    assert trained.generate(prompts[2:], processor, first=2, **ask) == trained.generate(prompts, processor, **ask)[2:]
    assert trained.generate(prompts[2:], processor, **ask) != trained.generate(prompts, processor, **ask)[2:]


def test_a_layout_can_be_sent_to_another_process_and_keeps_short_texts_only(processor):
    layout = processor.layout
    assert layout.text_ids("a red cat") is layout.text_ids("a red cat")
    long = "a red cat " * 30
    assert layout.text_ids(long) == encode_text(processor.tokenizer, long) and list(layout.known) == ["a red cat"]
    sent = pickle.loads(pickle.dumps(layout))
    assert sent.encode(["a red cat"]) == layout.encode(["a red cat"])


def test_the_slot_layout_is_a_layout(processor):
    """All that collation, packing and training know of a layout is the protocol."""
    layout = processor.layout
    assert isinstance(layout, Layout)
    assert (layout.max_length, layout.pad_token_id) == (CONTEXT, processor.tokenizer.pad_token_id)
    assert not isinstance(processor.tokenizer, Layout), (
        "a tokenizer has no encode of documents, but the check must see that"
    )


def test_corpora_of_a_recipe_can_be_sent_to_another_process():
    stage = Stage("s", (), {"definitions": 0.5, "pairs": 0.5}, 1e-3, 1, 1)
    sent = pickle.loads(pickle.dumps(corpora_of(stage)))
    assert next(iter(sent[0].read(sent[0].shards[0]))).parts
