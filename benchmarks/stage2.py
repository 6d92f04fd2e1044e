"""How much faster is a packed, cached step of stage II than a plain one?

    python benchmarks/stage2.py --pairs 12

Plain (A): documents padded to the longest, pictures opened and encoded in every step, the last picture of a document
read though nobody uses it, the null condition in a pass of its own, logits at every place. Fast (B): the `Trainer`'s
own task, as `dreamllm_edu.train` runs it: features from disk, packed rows, one pass. Both take the same documents
through the same model, forward, backward and AdamW; A and B alternate, so that a busy machine slows both. Prints
documents a second and the ratio with its 95 % bootstrap interval over the pairs."""
import argparse
import contextlib
import tempfile
import time
from dataclasses import replace

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from dreamllm_edu.data.readers import emoji
from dreamllm_edu.models.dreamllm.family import DreamLLMFamily
from dreamllm_edu.sequences import collate
from dreamllm_edu.training.batches import Steps, joined, step_stream
from dreamllm_edu.training.features import FeatureStore, fill_store, fingerprint
from dreamllm_edu.training.recipe import recipe_of
from dreamllm_edu.training.stage import Settings
from dreamllm_edu.training.trainer import Trainer


def plain_step(model, items, layout):
    """The step as one would first write it."""
    pixels = joined(items, "pixels")
    out = model(
        **collate([item.row for item in items], layout.pad_token_id),
        pixel_values=pixels.get("images"),
        target_pixel_values=pixels.get("targets"),
        **joined(items, "random"),
    )
    out.loss.backward()


def plain_steps(family, stage, corpora, settings):
    """(items, number of documents) of every step, with the last picture read and nothing stored."""
    stage = replace(stage, read_last=True)
    for items, _ in step_stream(Steps(family, family.objective(stage), stage, corpora, settings)):
        yield items, len(items)


def fast_steps(trainer):
    """(micro-batches, number of documents) of every step, as the trainer gets them."""
    for batches, _, documents in trainer.task.steps(0, {}):
        yield batches, documents["documents"]


def timed(stream, gradients, optimizer):
    """Seconds a document, of one step with its data."""
    began = time.perf_counter()
    data, documents = next(stream)
    optimizer.zero_grad()
    gradients(data)
    optimizer.step()
    return (time.perf_counter() - began) / documents


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--same-attention", action="store_true", help="give A the faster attention of B too")
    parser.add_argument("--precision", choices=["no", "bf16"], default="no", help="of A and B alike")
    args = parser.parse_args()
    stage = replace(recipe_of("mini").stages[1], batch=args.batch, read_last=False, ema_decay=0.0, learning_rate=0.0)
    settings, family = Settings(precision=args.precision), DreamLLMFamily.build("mini")
    kinds = {
        kind: entry["weight"] if isinstance(entry, dict) else entry
        for kind, entry in stage.mixture.items()
        if kind != "definitions"
    }
    corpora = [emoji(kind, [kind], weight=weight) for kind, weight in kinds.items()]
    plain_attention = (lambda: sdpa_kernel(SDPBackend.MATH)) if args.same_attention else contextlib.nullcontext

    def plain(items):
        with plain_attention(), torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
            plain_step(family.model, items, family.layout)

    with tempfile.TemporaryDirectory() as folder:
        store = FeatureStore(folder, fingerprint(family))
        began = time.perf_counter()
        print("stored", fill_store(store, family, corpora), f"in {time.perf_counter() - began:.0f} s, once")
        trainer = Trainer.of_stage(family, stage, corpora, None, settings, store, progress=False)
        trainer.start()  # its optimizer serves A and B; the learning rate is 0, so the weights stay
        streams = {"A": plain_steps(family, stage, corpora, settings), "B": fast_steps(trainer)}
        gradients = {"A": plain, "B": trainer.gradients}
        for key in "AB":
            timed(streams[key], gradients[key], trainer.optimizer)  # not counted: the first step is slower
        seconds = np.array(
            [[timed(streams[key], gradients[key], trainer.optimizer) for key in "AB"] for _ in range(args.pairs)]
        )
    draws = np.random.default_rng(0).integers(args.pairs, size=(2000, args.pairs))
    ratios = seconds[draws, 0].sum(1) / seconds[draws, 1].sum(1)
    print(
        f"A plain {1 / seconds[:, 0].mean():.1f} documents a second, B packed and cached {1 / seconds[:, 1].mean():.1f}"
    )
    print(
        f"ratio {seconds[:, 0].sum() / seconds[:, 1].sum():.2f} [{np.quantile(ratios, 0.025):.2f}, "
        f"{np.quantile(ratios, 0.975):.2f}], {args.pairs} pairs of {args.batch}"
    )


if __name__ == "__main__":
    main()
