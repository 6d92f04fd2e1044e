"""What `test_ranks.py` runs in every process: the same short trainings, shared in different ways.

    torchrun --nproc-per-node N tests/ranks.py FOLDER PARALLEL..."""
import os
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from test_train import QUICK, some_corpora, stage, texts_only
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from dreamllm_edu.documents.document import Document
from dreamllm_edu.models.dreamllm.processor import DreamLLMProcessor
from dreamllm_edu.parts.tokenizer import train_tokenizer
from dreamllm_edu.training import trainer as engine
from dreamllm_edu.training.batches import Steps, step_stream
from dreamllm_edu.training.ranks import rank_and_world
from dreamllm_edu.training.strategies import whole
from dreamllm_edu.training.trainer import run, save_weights

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


def settings(parallel):
    return replace(QUICK, parallel=parallel, lanes=4, save_every=3)


def keep_weights(model, path):
    """All that trains, whole and in full precision, for the comparison."""
    found = {n: whole(p).detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    if rank_and_world()[0] == 0:
        save_file(found, path)


def train_all(folder, parallel):
    """Five steps of every stage; stage II with a checkpoint after three."""
    for number in (1, 2, 3):
        model, there = make_tiny(), folder / f"{parallel}-{rank_and_world()[1]}-stage{number}"
        run(model, processor(), stage(number, batch=4), corpora(), there, settings(parallel), progress=False)
        keep_weights(model, there / "weights.safetensors")
    save_weights(model, folder / f"{parallel}-{rank_and_world()[1]}.safetensors")


def stage_two(folder, parallel, trackers=(), samples=None, **options):
    """Five steps of stage II, or what is left of them after the checkpoint in `folder`."""
    model = make_tiny()
    run(
        model,
        processor(),
        stage(2, batch=4),
        corpora(),
        folder,
        replace(settings(parallel), **options),
        progress=False,
        trackers=trackers,
        samples=samples,
    )
    keep_weights(model, folder / "weights.safetensors")
    cut = {name.split(".")[0] for name, p in model.named_parameters() if hasattr(p, "ds_numel")}
    assert parallel != "zero3" or cut and not cut & set(model.frozen_parts), f"DeepSpeed cut up {sorted(cut)}"


@contextmanager
def second_step_spoilt():
    """On one rank the losses of the second step are not numbers."""
    real, calls = engine.packed_losses, []

    def sometimes(*args):
        calls.append(0)
        tokens, pictures, zero = real(*args)
        return (tokens * float("nan") if len(calls) == 2 and rank_and_world()[0] == 1 else tokens), pictures, zero
    engine.packed_losses = sometimes
    try:
        yield
    finally:
        engine.packed_losses = real


def ranks_without_pictures(world):
    """How often, in five steps, a rank of `world` has a document but no picture to draw."""
    steps = [next_steps(rank, world) for rank in range(world)]
    return sum(not any(item.row.targets for item in items) for share in steps for items in share)


def next_steps(rank, world):
    stream = step_stream(Steps(corpora(), processor(), make_tiny().config, 4, rank, world, read_last=False))
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
        elif kind == "die":
            class Death:
                def log(self, values, step):
                    if step == 4 and rank_and_world()[0] == 1:
                        os._exit(9)
            stage_two(folder / "dead", way, [Death()])
        else:
            train_all(folder, job)
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(
        0
    # all is on disk; taking the interpreter down was once seen to abort in one of torch's threads, after the last job
    )
