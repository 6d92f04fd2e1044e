"""Models with random weights and documents that are made on the spot: the GPU check reads no data."""

import io
from functools import partial
from random import Random

import numpy as np
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from dreamllm_edu.data.records import Corpus, Picture, Record
from dreamllm_edu.models.dreamllm.config import DreamLLMConfig
from dreamllm_edu.models.dreamllm.family import DreamLLMFamily
from dreamllm_edu.models.dreamllm.model import DreamLLM
from dreamllm_edu.models.dreamllm.processor import DreamLLMProcessor
from dreamllm_edu.parts.diffusion import scheduler_config, unet_config, vae_config
from dreamllm_edu.parts.language import llama_config
from dreamllm_edu.parts.tokenizer import train_tokenizer
from dreamllm_edu.parts.vision import clip_config
from dreamllm_edu.training.stage import Settings, Stage

SENTENCES = ["a red cat in Noto style: ", "this is a blue dog. ", "one two three four five ", "what is this? "]
TRAINED = ("visual_projector", "dream_queries", "condition_projector", "language_model")


def tiny_config() -> DreamLLMConfig:
    """A DreamLLM of about 150,000 weights, for checks that compare numbers."""
    clip = clip_config(vocab_size=300, hidden=32, layers=2, text_layers=1, heads=2)
    return DreamLLMConfig(
        llama_config(vocab_size=300, hidden=32, layers=2, heads=2, ffn=64, context=256),
        clip.vision_config,
        unet_config(channels=(16, 32), latent_channels=4, condition=24, heads=2),
        vae_config(channels=(8, 8, 8, 8), latent_channels=4),
        scheduler_config(),
        num_queries=4,
    )


def mini_config() -> DreamLLMConfig:
    """The sizes of the shipped miniature: 13 million weights."""
    return DreamLLMConfig(
        llama_config(), clip_config().vision_config, unet_config(), vae_config(), scheduler_config(), num_queries=8
    )


def small_config() -> DreamLLMConfig:
    """The sizes of `recipes/small.yaml`, with the token ids of the tokenizer that is trained here."""
    from dreamllm_edu.planning import scale_config

    config = scale_config("small")
    config.dream_start_id, config.image_start_id, config.query_token_id = 3, 6, 4
    text = config.text_config
    text.pad_token_id, text.bos_token_id, text.eos_token_id = 0, 1, 2
    return config


def build_model(config: DreamLLMConfig, device: torch.device, seed: int = 0) -> DreamLLM:
    """Random weights, drawn on the device itself: nothing of that size ever lies on the CPU."""
    torch.manual_seed(seed)
    with device:
        return DreamLLM(config).eval()


def build_processor(config: DreamLLMConfig, max_length: int) -> DreamLLMProcessor:
    """A processor for the sizes of `config`, with a tokenizer of 300 pieces."""
    side = config.vision_config.image_size
    pixels = config.unet_config["sample_size"] * 2 ** (len(config.vae_config["block_out_channels"]) - 1)
    images = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    tokenizer = train_tokenizer(SENTENCES * 4, vocab_size=300)
    return DreamLLMProcessor(images, tokenizer, config.num_queries, config.num_patches, pixels, max_length)


def build_family(config: DreamLLMConfig, device: torch.device, max_length: int, seed: int = 0) -> DreamLLMFamily:
    return DreamLLMFamily(build_model(config, device, seed), build_processor(config, max_length))


def picture(seed: int, size: int = 64) -> Image.Image:
    """A smooth random picture, another one for each seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)


def stored_picture(seed: int, size: int) -> Picture:
    file = io.BytesIO()
    picture(seed, size).save(file, "PNG")
    return Picture(file.getvalue(), f"picture {seed}")


def made_records(shard: str, size: int, longest: int, n: int = 64, pictures: int = 16):
    """Documents of different lengths: in turn a prompt with its picture, and a text with a picture in its middle.
    `longest`: sentences of the longest text."""
    shown = [stored_picture(i, size) for i in range(pictures)]
    for i in range(n):
        random = Random(f"{shard}/{i}")
        text = lambda: "".join(random.choices(SENTENCES, k=random.randint(1, longest)))  # noqa: B023
        parts = [text(), shown[i % pictures]] if i % 2 else [text(), shown[i % pictures], text()]
        yield Record(parts, i % 2, f"{shard}:{i}", shard)


def made_corpora(size: int = 64, longest: int = 4, n: int = 64) -> list[Corpus]:
    return [Corpus("made", ("made",), partial(made_records, size=size, longest=longest, n=n))]


def made_stage(**options) -> Stage:
    """Stage II: everything that is ever trained is trained."""
    given = {"learning_rate": 1e-3, "steps": 4, "batch": 4, "ema_decay": 0.0, "warmup": 1, "read_last": False}
    return Stage("check", TRAINED, {}, **{**given, **options})


QUICK = Settings(lanes=4, save_every=2, log_every=2, max_length=256)
