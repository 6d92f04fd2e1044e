"""The lesson's loop (padded documents, one after the other) and the engine for every scale (packed rows, shares) are one training."""
from dataclasses import replace

import torch
from conftest import make_tiny
from test_train import QUICK, curve, some_corpora, stage

from dreamllm_edu.sequences import collate
from dreamllm_edu.training.batches import Steps, stacked, step_stream
from dreamllm_edu.training.fit import fit
from dreamllm_edu.training.stage import set_trainable
from dreamllm_edu.training.trainer import run


def test_padded_and_packed_training_are_the_same_losses_and_weights(processor, tmp_path):
    """Three steps of stage II on the same documents with the same noise, by both."""
    what = stage(2, steps=3, warmup=1)
    settings = replace(QUICK, betas=(0.9, 0.99), weight_decay=0.01)
    packed = make_tiny()
    run(packed, processor, what, some_corpora(), tmp_path, settings, progress=False)

    padded = make_tiny()
    set_trainable(padded, what)
    stream = step_stream(Steps(some_corpora(), processor, padded.config, QUICK.lanes, per_lane=what.batch // QUICK.lanes, read_last=False))

    def loss_of_step(model, step, generator):
        items, _ = next(stream)
        random = {name: torch.cat([item.dice[name] for item in items]) for name in items[0].dice}
        out = model(**collate([item.row for item in items], processor.layout.id["<pad>"]), pixel_values=stacked(items, "pixels"),
                    target_pixel_values=stacked(items, "targets"), vae_noise=random["vae_noise"], noise=random["noise"],
                    timesteps=random["timesteps"], condition_drop_mask=random["drop"])
        return {"loss": out.loss, "lm": out.lm_loss, "image": out.image_loss}

    averaged, history = fit(padded, loss_of_step, 3, what.learning_rate, warmup=1, ema_decay=what.ema_decay, mixed_precision="no", progress=False)
    for ours, theirs in zip(history, curve(tmp_path), strict=True):
        assert abs(ours["lm"] - theirs["lm"]) < 1e-5 and abs(ours["image"] - theirs["image"]) < 1e-5
    named = dict(averaged.named_parameters())
    moved = 0.0
    for name, p in packed.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p, named[name], atol=1e-5, rtol=0)
            moved = max(moved, (p - dict(make_tiny().named_parameters())[name]).abs().max().item())
    assert moved > 1e-3, "nothing was trained, so nothing was compared"
