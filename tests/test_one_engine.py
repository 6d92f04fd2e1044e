"""The lesson's loop (padded documents, one after the other) and the trainer for every scale (packed rows, shares) are
one training."""

from dataclasses import replace

import torch
from test_train import QUICK, curve, run, some_corpora, stage, steps_of

from dreamllm_edu.sequences import collate
from dreamllm_edu.training.batches import joined
from dreamllm_edu.training.fit import fit
from dreamllm_edu.training.stage import set_trainable

from conftest import make_tiny


def test_padded_and_packed_training_are_the_same_losses_and_weights(processor, tmp_path):
    """Three steps of stage II on the same documents with the same noise, by both."""
    what = stage(2, steps=3, warmup=1)
    settings = replace(QUICK, betas=(0.9, 0.99), weight_decay=0.01)
    packed = make_tiny()
    run(packed, processor, what, some_corpora(), tmp_path, settings)

    padded = make_tiny()
    set_trainable(padded, what)
    stream = steps_of(some_corpora(), processor, padded, per_lane=what.batch // QUICK.lanes)

    def loss_of_step(model, step, generator):
        items, _ = next(stream)
        random, pixels = joined(items, "random"), joined(items, "pixels")
        out = model(
            **collate([item.row for item in items], processor.layout.pad_token_id),
            pixel_values=pixels["images"],
            target_pixel_values=pixels["targets"],
            **random,
        )
        return {"loss": out.loss, "lm": out.lm_loss, "image": out.image_loss}

    averaged, history = fit(
        padded, loss_of_step, 3, what.learning_rate, warmup=1, ema_decay=what.ema_decay, progress=False
    )
    for ours, theirs in zip(history, curve(tmp_path), strict=True):
        assert abs(ours["lm"] - theirs["lm"]) < 1e-5 and abs(ours["image"] - theirs["image"]) < 1e-5
    before, padded_weights = dict(make_tiny().named_parameters()), dict(averaged.named_parameters())
    trained = {name: p for name, p in packed.named_parameters() if p.requires_grad}
    for name, p in trained.items():
        torch.testing.assert_close(p, padded_weights[name], atol=1e-5, rtol=0)
    assert max((p - before[name]).abs().max().item() for name, p in trained.items()) > 1e-3, (
        "nothing was trained, so nothing was compared"
    )
