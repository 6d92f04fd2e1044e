"""A whole DreamLLM of a few hundred thousand random weights, made in seconds: what is tested is the code, not the
shipped weights."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from dreamllm_edu.data.world import World
from dreamllm_edu.documents.document import Document
from dreamllm_edu.models.dreamllm.config import DreamLLMConfig
from dreamllm_edu.models.dreamllm.model import DreamLLM
from dreamllm_edu.models.dreamllm.processor import DreamLLMProcessor
from dreamllm_edu.parts.diffusion import scheduler_config, unet_config, vae_config
from dreamllm_edu.parts.language import llama_config
from dreamllm_edu.parts.tokenizer import train_tokenizer
from dreamllm_edu.parts.vision import clip_config
from dreamllm_edu.training.fit import fit

ROOT = Path(__file__).resolve().parents[1]
torch.set_num_threads(1)
QUERIES, PATCHES, CONTEXT = 4, 16, 256
SENTENCES = [
    "a red cat in Noto style:",
    " This is a blue dog.",
    "User: what is this?\nAssistant:",
    " one two three four five",
]


def picture(seed=0, size=64, mode="RGB"):
    """A smooth random picture, another one for each seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC).convert(mode)


def make_tiny(seed=0, **options):
    torch.manual_seed(seed)
    clip = clip_config(vocab_size=300, hidden=32, layers=2, text_layers=1, heads=2)
    return DreamLLM(
        DreamLLMConfig(
            text_config=llama_config(vocab_size=300, hidden=32, layers=2, heads=2, ffn=64, context=CONTEXT),
            vision_config=clip.vision_config,
            unet_config=unet_config(channels=(16, 32), latent_channels=4, condition=24, heads=2),
            vae_config=vae_config(channels=(8, 8, 8, 8), latent_channels=4),
            scheduler_config=scheduler_config(),
            num_queries=QUERIES,
            **options,
        )
    ).eval()


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(SENTENCES * 4, vocab_size=300)


@pytest.fixture(scope="session")
def processor(tokenizer):
    images = CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    return DreamLLMProcessor(images, tokenizer, num_queries=QUERIES, num_patches=PATCHES, max_length=CONTEXT)


@pytest.fixture
def tiny():
    """A fresh random model; a test may change it."""
    return make_tiny()


def lessons():
    """Two documents with pictures inside, told apart by their prompts."""
    return [Document(["cat:", " a red cat", picture(1), " and a blue", picture(2), " end"], 1, "cat"),
            Document(["dog:", picture(3), " two dogs sit"], 1, "dog")]


@pytest.fixture(scope="session")
def trained(processor):
    """The tiny model after it has learned the words of `lessons` by heart: it decides for itself where pictures come.
    Do not change it."""
    model, batch = make_tiny(), processor(lessons())
    words = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    pool = model.encode_images(processor.pixels([picture(i) for i in range(40)] + [Image.effect_noise((64, 64), 100)]))

    def loss(m, step, generator):  # other pictures at every step, so that its own drawings do not confuse it
        return {"loss": m(**words, image_features=pool[torch.randint(len(pool), (3,), generator=generator)]).loss}

    model, history = fit(model, loss, 150, 1e-2, warmup=10, progress=False)
    assert history[-1]["loss"] < 0.1, "two documents are soon learned by heart"
    return model


@pytest.fixture(scope="session")
def world():
    return World()


@contextmanager
def full_disk(limit=4096):
    """Within it no file can grow beyond `limit` bytes: the operating system itself refuses the write, as on a full
    disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def run_command(*arguments, cwd, stdin=None, timeout=200):
    """`dreamllm-edu ARGUMENTS` in a process of its own, in a strange folder and without network."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from dreamllm_edu.app.cli import main; sys.exit(main())",
            *map(str, arguments),
        ],
        cwd=cwd,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment,
    )
