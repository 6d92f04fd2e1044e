"""What `test_ranks.py` runs in every process: the same short trainings, shared in different ways.

    torchrun --nproc-per-node N tests/ranks.py FOLDER PARALLEL..."""
import json
import os
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from test_train import QUICK, some_corpora, stage, steps_of, texts_only
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from dreamllm_edu import files
from dreamllm_edu.documents.document import Document
from dreamllm_edu.models.dreamllm.family import DreamLLMFamily
from dreamllm_edu.models.dreamllm.objective import DreamLLMObjective
from dreamllm_edu.models.dreamllm.processor import DreamLLMProcessor
from dreamllm_edu.parts.tokenizer import train_tokenizer
from dreamllm_edu.training import checkpoint
from dreamllm_edu.training.ranks import rank_and_world
from dreamllm_edu.training.trainer import Trainer, save_trained_tensors

from conftest import CONTEXT, PATCHES, QUERIES, SENTENCES, make_tiny


def processor():
    images = CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    return DreamLLMProcessor(
        images,
        train_tokenizer(SENTENCES * 4, vocab_size=300),
        num_queries=QUERIES,
        num_patches=PATCHES,
        max_length=CONTEXT,
    )


def corpora():
    """Texts without pictures among the rest: with one document a rank, some rank has none in nearly every step."""
    return some_corpora() + [texts_only()]


def settings(strategy):
    return replace(QUICK, strategy=strategy, lanes=4, save_every=3)


def keep_weights(trainer, path):
    """All that trains, whole and in full precision, for the comparison."""
    found = {n: trainer.strategy.gather(p).detach().clone() for n, p in trainer.trained.items()}
    if rank_and_world()[0] == 0:
        save_file(found, path)


def train_one(number, folder, strategy, trackers=(), samples=(), **options):
    """Five steps of a stage, or what is left of them after the checkpoint in `folder`."""
    family = DreamLLMFamily(make_tiny(), processor())
    trainer = Trainer.of_stage(
        family,
        stage(number, batch=4),
        corpora(),
        folder,
        replace(settings(strategy), **options),
        progress=False,
        trackers=trackers,
        samples=samples,
    )
    trainer.train()
    keep_weights(trainer, folder / "weights.safetensors")
    return family, trainer


def train_all(folder, strategy):
    """Five steps of every stage; stage II with a checkpoint after three."""
    name = f"{strategy}-{rank_and_world()[1]}"
    for number in (1, 2, 3):
        family, trainer = train_one(number, folder / f"{name}-stage{number}", strategy)
    save_trained_tensors(trainer, family.trained_tensors(), folder / f"{name}.safetensors")


def stage_two(folder, strategy, **options):
    family, trainer = train_one(2, folder, strategy, **options)
    cut = {name.split(".")[0] for name, p in family.model.named_parameters() if hasattr(p, "ds_numel")}
    assert strategy != "zero3" or cut and not cut & set(family.frozen_parts), f"DeepSpeed cut up {sorted(cut)}"


@contextmanager
def second_step_spoilt():
    """On one rank the losses of the second step are not numbers."""
    real, calls = DreamLLMObjective.losses, []

    def sometimes(*args):
        calls.append(0)
        losses, zero = real(*args)
        return (
            {**losses, "lm": losses["lm"] * float("nan")} if len(calls) == 2 and rank_and_world()[0] == 1 else losses
        ), zero

    DreamLLMObjective.losses = sometimes
    try:
        yield
    finally:
        DreamLLMObjective.losses = real


def check_together(folder):
    """Which pieces this rank reads to find the newest whole checkpoint, and which one all take for it."""
    real, read = checkpoint.piece_checksum, []
    checkpoint.piece_checksum = lambda path, number: read.append(f"{path.name}:{number}") or real(path, number)
    path, state = checkpoint.last_checkpoint(folder, report=lambda text: read.append(text))
    checkpoint.piece_checksum = real
    (folder / f"read-by-{rank_and_world()[0]}.json").write_text(json.dumps([read, path and path.name, state]))


def ranks_without_pictures(world):
    """How often, in five steps, a rank of `world` has a document but no picture to draw."""
    steps = [next_steps(rank, world) for rank in range(world)]
    return sum(not any(item.row.targets for item in items) for share in steps for items in share)


def next_steps(rank, world):
    stream = steps_of(corpora(), processor(), make_tiny(), rank, world)
    return [next(stream)[0] for _ in range(5)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    folder = Path(sys.argv[1])
    for job in sys.argv[2:]:
        job, _, there = job.partition(":")
        way = "zero3" if job.startswith("zero3") else "fsdp2"
        kind = job.removeprefix("zero3-")
        if kind == "resume":
            stage_two(folder / there, way)
        elif kind == "samples":
            stage_two(folder / job, way, sample_every=2, samples=[Document(["a red apple"])])
        elif kind == "bf16":
            stage_two(folder / job, way, precision="bf16")
        elif kind == "micro":
            stage_two(folder / job, way, micro_batch=1, checkpointing=True)
        elif kind == "nan":
            with second_step_spoilt():
                stage_two(folder / job, way)
        elif kind == "check":
            files.PIECE = 20_000
            check_together(folder / there)
        elif kind == "pieces":
            files.PIECE = 20_000
            stage_two(folder / there, "ddp")
        elif kind == "die":
            class Death:
                def log(self, values, step):
                    if step == 4 and rank_and_world()[0] == 1:
                        os._exit(9)
            stage_two(folder / "dead", way, trackers=[Death()])
        else:
            train_all(folder, job)
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(
        0
    # all is on disk; taking the interpreter down was once seen to abort in one of torch's threads, after the last job
    )
