"""Which numbers generate() uses; a walk of any number of steps; what transformers' own tools expect of a model."""
import copy
import warnings
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from test_equivalences import Knowing
from transformers import GenerationConfig, Trainer, TrainingArguments

from dreamllm_edu import DreamLLM, DreamLLMPipeline
from dreamllm_edu.documents.document import Document, Dream
from dreamllm_edu.models.dreamllm.generation import GenerationOptions
from dreamllm_edu.parts.diffusion import DDIM, sample_latents, scheduler_config

from conftest import make_tiny, picture

# ---------------------------------------------------------------- steps


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_ddim_walks_exactly_as_many_steps_as_asked(spacing):
    sampler = DDIM(**{**scheduler_config(), "timestep_spacing": spacing})
    for steps in range(1, 1001):
        sampler.set_timesteps(steps)
        times = sampler.timesteps
        assert len(times) == steps and times.min() >= 0 and times.max() < 1000, steps
        assert (times[:-1] > times[1:]).all(), steps


def watched(kind, predicts, steps):
    """Distance from the picture of a network that knows it, and the time steps that it was shown."""
    scheduler, words = DDPMScheduler(**scheduler_config(predicts)), torch.zeros(2, 2, 8)
    z, noise = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    knowing, times = Knowing(z, scheduler), []

    def network(x, t, encoder_hidden_states):
        times.append(float(t))
        return knowing(x, t, encoder_hidden_states)

    network.config = knowing.config
    sampler = getattr(diffusers, f"{kind}Scheduler").from_config(scheduler.config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        end = sample_latents(
            network, scheduler, words, words, 1.0, steps, torch.Generator().manual_seed(1), noise=noise, sampler=sampler
        )
    return (end - z).abs().max().item(), times


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 3, 7, 61, 62, 103, 121, 333, 999])
def test_ddim_goes_from_level_to_level_of_its_list(predicts, steps):
    gap, times = watched("DDIM", predicts, steps)
    assert len(times) == steps and min(times) >= 0 and gap < 1e-3


ONE_CALL_A_STEP = ("DDPM", "EulerDiscrete", "EulerAncestralDiscrete", "UniPCMultistep", "DPMSolverMultistep",
                   "DDIMParallel", "LCM")


@pytest.mark.parametrize("kind", ONE_CALL_A_STEP)
@pytest.mark.parametrize("steps", [3, 20, 61, 62, 103])
def test_other_samplers_walk_so_many_steps_or_refuse(kind, steps):
    try:
        gap, times = watched(kind, "epsilon", steps)
    except ValueError as error:
        assert 1000 % steps and str(steps) in str(error)
        return
    assert len(times) == steps and min(times) >= 0 and gap < 0.05


@pytest.mark.parametrize("steps", [1, 20, 50])
def test_where_the_steps_divide_the_levels_ddim_is_that_of_diffusers(steps):
    class Net:
        config = SimpleNamespace(sample_size=8, in_channels=4)

        def __call__(self, x, t, encoder_hidden_states):
            return SimpleNamespace(sample=torch.sin(3 * x + float(t)))

    noise, words = torch.randn(2, 4, 8, 8), torch.zeros(2, 2, 8)
    for predicts in ("epsilon", "v_prediction"):
        scheduler = DDPMScheduler(**scheduler_config(predicts))
        theirs, x = DDIMScheduler.from_config(scheduler.config), noise
        theirs.set_timesteps(steps)
        for t in theirs.timesteps:
            x = theirs.step(Net()(x, t, None).sample, t, x).prev_sample
        assert torch.equal(x, sample_latents(Net(), scheduler, words, words, 1.0, steps, noise=noise))


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5, "20"])
def test_impossible_numbers_of_steps_are_refused(steps, tiny):
    words = torch.zeros(1, 2, tiny.unet.config.cross_attention_dim)
    with pytest.raises(ValueError, match="num_inference_steps"):
        sample_latents(tiny.unet, tiny.scheduler, words, words, num_inference_steps=steps)


# ---------------------------------------------------------------- options


def chosen(given, *configs):
    options = GenerationOptions.chosen(given, *configs)
    return options.max_new_tokens, options.temperature


def test_what_is_typed_wins_over_any_configuration():
    short, warm = GenerationConfig(max_new_tokens=8), GenerationConfig(do_sample=True, temperature=0.7)
    assert chosen({}) == (120, 0.0)
    assert chosen({}, short) == (8, 0.0) and chosen({"max_new_tokens": 3}, short) == (3, 0.0)
    assert chosen({}, None, short) == (8, 0.0) and chosen({}, GenerationConfig(max_new_tokens=5), short) == (5, 0.0)
    assert chosen({}, warm) == (120, 0.7) and chosen({"temperature": 0.0}, warm) == (120, 0.0)
    assert chosen({"do_sample": False}, warm) == (120, 0.0) and chosen({"temperature": 2.0}, warm) == (120, 2.0)
    assert chosen({"do_sample": True}) == (120, 1.0) and chosen({"do_sample": True, "temperature": 0.5}) == (120, 0.5)
    assert chosen({"do_sample": True}, None, GenerationConfig(temperature=0.3)) == (120, 0.3)


def test_the_models_own_configuration_counts_and_is_saved(tmp_path, processor):
    model, prompt = make_tiny(), Document(["a"])
    words = lambda m, **more: len(processor.layout.text_ids(
        m.generate(prompt, processor, max_pictures=0, **more).parts[-1]))
    long = words(model, max_new_tokens=9)
    model.generation_config.max_new_tokens = 2
    assert words(model) <= 2 < long == words(model, max_new_tokens=9)
    model.save_pretrained(tmp_path)
    again = DreamLLM.from_pretrained(tmp_path)
    assert again.generation_config.max_new_tokens == 2 and words(again) <= 2
    assert DreamLLM.from_pretrained(
        tmp_path, generation_config=GenerationConfig(max_new_tokens=7)).generation_config.max_new_tokens == 7
    assert words(DreamLLMPipeline(again, processor).model) <= 2


def test_the_pipeline_leaves_to_the_model_what_it_is_not_told(processor):
    model = make_tiny()
    model.generation_config.num_inference_steps = 3
    asked = []
    model.unet.register_forward_hook(lambda *_: asked.append(1))
    DreamLLMPipeline(model, processor)("a")
    assert len(asked) == 3
    DreamLLMPipeline(model, processor)("a", num_inference_steps=2)
    assert len(asked) == 5


def test_evaluation_mode_is_left_alone_and_training_mode_comes_back(processor):
    model = make_tiny()
    turned = []
    model.eval()
    plain, model.eval = model.eval, lambda: turned.append(1) or plain()
    model.generate(Document(["a"]), processor, max_new_tokens=1)
    assert not turned and not model.training, "another thread may be generating with it"
    model.train()
    model.generate(Document(["a"]), processor, max_new_tokens=1)
    assert turned and model.training


def test_requested_pictures_are_those_of_one_pass_and_of_two(processor, trained):
    """A prompt's queries are fed together with its text; those of a second Dream() behind it are not."""
    passes = []
    trained.language_model.model.register_forward_hook(lambda *_: passes.append(1))
    once = trained.generate(
        Document(["owl in Noto style:", Dream()]), processor, max_new_tokens=0, num_inference_steps=2
    )
    assert len(passes) == 2, "the text with its queries, and the null condition"
    both = trained.generate(
        [Document(["owl in Noto style:", Dream()]), Document(["a cat", Dream(), Dream()])],
        processor, max_new_tokens=0, num_inference_steps=2)
    levels = lambda document: np.asarray(document.parts[1], int)
    assert abs(levels(both[0]) - levels(once)).max() <= 2 and len(both[1].pictures) == 2


# ---------------------------------------------------------------- transformers' own tools


def test_a_typing_error_in_forward_is_an_error(tiny):
    ids = torch.tensor([[1, 50, 51]])
    with pytest.raises(TypeError, match="lables"):
        tiny(input_ids=ids, lables=ids)
    assert len(tiny(input_ids=ids, labels=ids, return_dict=False)[0].shape) == 0


def trainer(model, processor, folder, documents, batch=8, accumulate=1, **more):
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=batch, per_device_eval_batch_size=batch,
        gradient_accumulation_steps=accumulate, max_steps=1, learning_rate=0.0, report_to=[], use_cpu=True,
        logging_steps=1, remove_unused_columns=False, save_strategy="no", disable_tqdm=True, seed=1, **more)
    return Trainer(model, arguments, train_dataset=documents, eval_dataset=documents,
                   data_collator=lambda d: dict(processor(list(d))))


def test_accumulation_changes_neither_loss_nor_gradient(tmp_path, processor):
    """Documents of very different lengths: each token counts once, in whichever micro-batch it stands."""
    documents = [Document(["a cat " * (1 + 3 * i)]) for i in range(8)]
    model, found = make_tiny(), []
    model.eval()
    whole = model(**processor(documents)).loss.item()
    for batch, accumulate in ((8, 1), (2, 4), (1, 8)):
        t = trainer(copy.deepcopy(model), processor, tmp_path, documents, batch, accumulate)
        t.train()
        log = t.state.log_history[0]
        found.append((log["loss"], log["grad_norm"]))
    for loss, norm in found:
        assert loss == pytest.approx(whole, abs=1e-3) and norm == pytest.approx(found[0][1], rel=1e-3)


def test_a_part_of_the_loss_is_its_share_of_the_tokens(processor):
    model, documents = make_tiny(), [Document(["a cat"]), Document(["a cat and a dog and a bird"])]
    model.eval()
    batches = [processor(d) for d in documents]
    tokens = sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)
    shares = sum(model(**b, num_items_in_batch=torch.tensor(tokens)).loss for b in batches)
    assert torch.allclose(shares, model(**processor(documents)).loss, atol=1e-5)
    nothing = {**batches[0], "labels": torch.full_like(batches[0]["labels"], -100)}
    assert model(**nothing, num_items_in_batch=0).loss == 0


@pytest.mark.parametrize("names", [None, ["labels"]])
def test_trainer_evaluates(names, tmp_path, processor):
    """With and without pictures, in batches of unlike lengths."""
    documents = [Document(["a cat"]), Document(["a dog and a bird"]), Document(["a", picture(1)]), Document(["b"])]
    t = trainer(make_tiny(), processor, tmp_path, documents, batch=1, label_names=names)
    assert 0 < t.evaluate()["eval_loss"] < 100
    predicted = t.predict(documents)
    assert predicted.predictions.shape[0] == len(documents) and predicted.predictions.ndim == 3


# ---------------------------------------------------------------- half precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("convert", [
    lambda m, d: m.to(d), lambda m, d: m.to("cpu", d), lambda m, d: m.bfloat16() if d == torch.bfloat16 else m.half(),
    lambda m, d: (m.language_model.to(d), m)[1]], ids=["to", "device and type", "method", "language model alone"])
def test_frequencies_stay_float32(convert, dtype):
    model = make_tiny()
    exact = model.language_model.model.rotary_emb.inv_freq.clone()
    converted = convert(model, dtype)
    assert next(converted.language_model.parameters()).dtype == dtype
    for name in ("inv_freq", "original_inv_freq"):
        kept = getattr(converted.language_model.model.rotary_emb, name)
        assert kept.dtype == torch.float32 and kept.equal(exact)
    assert model.double().language_model.model.rotary_emb.inv_freq.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_model_is_the_same_after_saving(dtype, tmp_path, processor):
    model = make_tiny().to(dtype)
    model.save_pretrained(tmp_path)
    again = DreamLLM.from_pretrained(tmp_path)
    ask = lambda m: m.generate(Document(["a cat", Dream()]), processor, max_new_tokens=0, num_inference_steps=1)
    assert next(again.parameters()).dtype == dtype and ask(model) == ask(again)
    assert ask(DreamLLM.from_pretrained(tmp_path, dtype=torch.float32).to(dtype)) == ask(model)
