"""How much faster is a packed, cached step of stage II than a plain one?

    python benchmarks/stage2.py --pairs 12

Plain (A): documents padded to the longest, pictures opened and encoded in every step, the last picture of a document
read though nobody uses it, the null condition in
a pass of its own, logits at every place. Fast (B): `dreamllm_edu.train`: features from disk, packed rows, one pass.
Both take the same documents through the
same model, forward, backward and AdamW; A and B alternate, so that a busy machine slows both. Prints documents a second
and the ratio with its
95 % bootstrap interval over the pairs."""
import argparse
import contextlib
import tempfile
import time

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from dreamllm_edu.data.readers import emoji
from dreamllm_edu.models.dreamllm.objective import fingerprint
from dreamllm_edu.models.dreamllm.weights import mini, mini_processor
from dreamllm_edu.sequences import collate
from dreamllm_edu.training.batches import Steps, stacked, step_stream
from dreamllm_edu.training.features import FeatureStore, fill_store
from dreamllm_edu.training.stage import STAGES, set_trainable
from dreamllm_edu.training.trainer import Settings, backward, micro_batches


def plain_step(model, items, layout, stage):
    """The step as one would first write it."""
    batch = collate([item.row for item in items], layout.id["<pad>"])
    dice = {name: torch.cat([item.dice[name] for item in items]) for name in items[0].dice}
    out = model(
        **batch,
        pixel_values=stacked(items, "pixels"),
        target_pixel_values=stacked(items, "targets"),
        vae_noise=dice["vae_noise"],
        noise=dice["noise"],
        timesteps=dice["timesteps"],
        condition_drop_mask=dice["drop"],
    )
    out.loss.backward()


def timed(stream, step, optimizer):
    began = time.perf_counter()
    items, _ = next(stream)
    optimizer.zero_grad()
    step(items)
    optimizer.step()
    return (time.perf_counter() - began) / len(items)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--same-attention", action="store_true", help="give A the faster attention of B too")
    parser.add_argument("--precision", choices=["no", "bf16"], default="no", help="of A and B alike")
    args = parser.parse_args()
    model, processor, stage, settings = (
        mini(trained=False).train(),
        mini_processor(),
        STAGES["mini"][1],
        Settings(precision=args.precision),
    )
    set_trainable(model, stage)
    kinds = {kind: weight for kind, weight in stage.mixture.items() if kind != "definitions"}
    corpora = [emoji(kind, [kind], weight=weight) for kind, weight in kinds.items()]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, fused=True)
    plain_attention = (lambda: sdpa_kernel(SDPBackend.MATH)) if args.same_attention else contextlib.nullcontext

    def plain(items):
        with plain_attention(), torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
            plain_step(model, items, processor.layout, stage)

    with tempfile.TemporaryDirectory() as folder:
        store = FeatureStore(folder, fingerprint(model))
        began = time.perf_counter()
        print("stored", fill_store(store, model, processor, corpora), f"in {time.perf_counter() - began:.0f} s, once")
        make = lambda store, last: step_stream(
            Steps(corpora, processor, model.config, 8, per_lane=args.batch // 8, store=store, read_last=last)
        )
        streams = {"A": make(None, True), "B": make(store, False)}
        steps = {
            "A": plain,
            "B": lambda items: backward(
                model, model, micro_batches(items, settings, processor.layout), stage, settings
            ),
        }
        for key in "AB":
            timed(streams[key], steps[key], optimizer)  # not counted: the first step is slower
        seconds = np.array([[timed(streams[key], steps[key], optimizer) for key in "AB"] for _ in range(args.pairs)])
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
