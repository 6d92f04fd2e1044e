"""A citizen of the Hugging Face world: auto classes, dtypes, checkpointing, attention choice, adapters, a folder for
the hub."""

import json

import pytest
import torch
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from dreamllm_edu.app.card import model_card, save_for_hub
from dreamllm_edu.data.world import World
from dreamllm_edu.documents.document import Document
from dreamllm_edu.models.dreamllm.model import DreamLLM
from dreamllm_edu.models.dreamllm.weights import mini, mini_processor
from dreamllm_edu.training.recipe import recipe_of
from dreamllm_edu.training.stage import set_trainable

from conftest import ROOT

METRICS = json.loads((ROOT / "dreamllm_edu/weights/mini/metrics.json").read_text())


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    save_for_hub(folder, mini(), mini_processor(), METRICS)
    return folder


def batch(processor):
    found = processor([Document(["red apple in Noto style:", apple()], 1)])
    return {k: v for k, v in found.items()}


def apple():
    world = World()
    return world.picture(f"noto/{world.by_name['red apple']['key']}")


def test_auto_classes_load_the_folder(hub):
    processor = AutoProcessor.from_pretrained(hub, local_files_only=True)
    inputs = batch(processor)
    wanted = mini()(**inputs, generator=torch.Generator().manual_seed(0)).loss
    for auto in (AutoModel, AutoModelForImageTextToText):
        model = auto.from_pretrained(hub, local_files_only=True)
        assert isinstance(model, DreamLLM)
        assert torch.allclose(
            model.eval()(**inputs, generator=torch.Generator().manual_seed(0)).loss, wanted, atol=1e-4
        )


def test_the_card_is_written_from_measured_numbers(hub):
    card = (hub / "README.md").read_text(encoding="utf8")
    assert card.startswith("---\nlicense: apache-2.0") and card == model_card(METRICS)
    assert f"{METRICS['layout']['f1']:.3g}" in card and "creation.held_out_renderings.concept_top5" in card


def test_dtype_and_device_map(hub):
    model = DreamLLM.from_pretrained(hub, dtype=torch.bfloat16, device_map={"": "cpu"})
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    loss = model.train()(**batch(mini_processor()), generator=torch.Generator().manual_seed(0)).loss
    assert torch.isfinite(loss)


def test_attention_is_chosen_by_the_config(hub):
    inputs = batch(mini_processor())
    found = {}
    for kind in ("eager", "sdpa"):
        model = DreamLLM.from_pretrained(hub, attn_implementation=kind).eval()
        assert (
            model.language_model.config._attn_implementation == kind
            and model.vision_encoder.config._attn_implementation == kind
        )
        with torch.no_grad():
            found[kind] = model(**inputs).logits
    assert (found["eager"] - found["sdpa"]).abs().max() < 1e-3


def test_gradient_checkpointing_computes_again_and_changes_no_gradient():
    inputs, model = batch(mini_processor()), mini()
    set_trainable(model, recipe_of("mini").stages[1])
    first, calls = model.language_model.model.layers[0].mlp, []
    first.register_forward_pre_hook(lambda *_: calls.append(1))
    def gradients():
        model.zero_grad()
        model.train()(**inputs, generator=torch.Generator().manual_seed(0)).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]
    plain, once = gradients(), len(calls)
    model.gradient_checkpointing_enable()
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(plain, gradients()))
    assert len(calls) == 3 * once, "forward, and once more on the way back"


def test_generation_config():
    model, processor, prompt = mini(), mini_processor(), Document(["Fruit in Noto style:"])
    short = model.generate(prompt, processor, max_new_tokens=3, max_pictures=0)
    same = model.generate(prompt, processor, max_pictures=0, generation_config=GenerationConfig(max_new_tokens=3))
    assert same.parts == short.parts
    sampled = [
        model.generate(
            prompt,
            processor,
            max_pictures=0,
            seed=s,
            generation_config=GenerationConfig(max_new_tokens=12, do_sample=True, temperature=3.0),
        ).texts
        for s in (0, 1)
    ]
    assert sampled[0] != sampled[1]


def test_lora_trains_little():
    import peft
    model = mini()
    inputs = batch(mini_processor())
    with torch.no_grad():
        before = model.eval()(**inputs).logits
    peft.inject_adapter_in_model(
        peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), model.language_model
    )  # in place: it stays a Llama
    set_trainable(model, recipe_of("mini").stages[2])
    with torch.no_grad():
        assert torch.allclose(model.eval()(**inputs).logits, before, atol=1e-5), "a new adapter changes nothing"
    trained = {n for n, p in model.named_parameters() if p.requires_grad and n.startswith("language_model")}
    assert trained and all("lora_" in n for n in trained)
    model.train()(**inputs, generator=torch.Generator().manual_seed(0)).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if n in trained)
