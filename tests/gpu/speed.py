"""Samples a second, tokens a second, MFU, memory and what compiling gains, of a model with random weights."""

import functools
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from inputs import TRAINED, build_family, made_corpora, made_stage, mini_config, small_config
from measuring import Context, Skip

from dreamllm_edu.documents.document import Document, Dream
from dreamllm_edu.models.dreamllm.family import recompute_activations
from dreamllm_edu.parts.diffusion import decode_latents
from dreamllm_edu.sequences import collate
from dreamllm_edu.training.batches import Batch, Steps, joined, pack_items, step_stream
from dreamllm_edu.training.features import FeatureStore, fill_store, fingerprint
from dreamllm_edu.training.report import peak_flops
from dreamllm_edu.training.stage import Settings
from dreamllm_edu.training.trainer import Trainer

CONVENTION = (
    "model FLOPs of one step as the trainer's log counts them (`DreamLLMFamily.step_flops`: PaLM's convention, without "
    "padding and recomputed activations), over its median time and the device's dense bfloat16 peak (`peak_flops`)"
)


@dataclass
class Setup:
    """The model that is measured, ready to train, and the same documents with pixels and with stored features."""

    name: str
    trainer: Trainer
    pixels: list
    stored: list
    seconds: dict[str, float]
    folder: TemporaryDirectory


def sizes(gpu: bool) -> tuple:
    """Name, configuration, tokens of a row at most, documents, sentences of a text, side of a picture in pixels."""
    return ("small", small_config(), 1024, 8, 30, 512) if gpu else ("mini", mini_config(), 512, 4, 8, 64)


@functools.cache
def setup(device: torch.device) -> Setup:
    """Made once: the model on the device, its trainer, a store of features, a step's documents."""
    name, config, longest, documents, sentences, side = sizes(device.type == "cuda")
    times, began = {}, time.time()

    def lap(what: str) -> None:
        nonlocal began
        times[what], began = time.time() - began, time.time()

    family, folder = build_family(config, device, longest), TemporaryDirectory()
    lap("build the model on the device")
    settings = Settings(lanes=4, precision="bf16", max_length=longest, log_every=10**9)
    stage, corpora = made_stage(batch=documents, learning_rate=1e-6, steps=10**6), made_corpora(side, sentences)
    store = FeatureStore(folder.name, fingerprint(family), resident=True)
    lap("fingerprint of the frozen parts")
    fill_store(store, family, corpora)
    lap("fill the store with 32 features")
    trainer = Trainer.of_stage(family, stage, corpora, None, settings, progress=False)
    trainer.start()
    lap("make the trainer")
    objective = family.objective(stage)
    steps = [Steps(family, objective, stage, corpora, settings, store=kept) for kept in (None, store)]
    pixels, stored = (next(step_stream(part))[0] for part in steps)
    return Setup(name, trainer, pixels, stored, times, folder)


def packed_batch(made: Setup, items: list) -> Batch:
    task, layout = made.trainer.task, made.trainer.task.family.layout
    return pack_items(items, layout, made.trainer.settings.max_length, task.objective.extra_rows(layout))


def packed_gradients(made: Setup, items: list) -> Callable[[], object]:
    """The trainer's own step: packed rows, the null condition in the same pass."""
    batch = packed_batch(made, items)
    return lambda: made.trainer.gradients([batch])


def padded_gradients(made: Setup, items: list) -> Callable[[], object]:
    """The step as one would first write it: padded documents, the null condition in a pass of its own."""
    task, model = made.trainer.task, made.trainer.model
    device = model.device
    tokens = collate([item.row for item in items], task.family.layout.pad_token_id)
    pixels, stored, random = (joined(items, kind) for kind in ("pixels", "stored", "random"))

    def inputs() -> dict:
        if pixels:
            return {"pixel_values": pixels.get("images"), "target_pixel_values": pixels["targets"], **random}
        images = stored["images"].to(device).float() if "images" in stored else None
        mean, std = stored["targets"].to(device).float().unbind(1)
        others = {name: tensor.to(device) for name, tensor in random.items()}
        latents = mean + std * others.pop("vae_noise")
        return {"image_features": images, "latents": latents, **others}

    def gradients() -> None:
        on_device = {name: tensor.to(device) for name, tensor in tokens.items()}
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(**on_device, **inputs(), labelled_only=True).loss
        loss.backward()

    return gradients


def whole_step(made: Setup, gradients: Callable[[], object]) -> Callable[[], None]:
    """Gradients, clipping and AdamW."""
    strategy = made.trainer.strategy

    def step() -> None:
        strategy.zero_grad()
        gradients()
        strategy.step(1.0)

    return step


def reset_peak(ctx: Context) -> None:
    if ctx.gpu:
        torch.cuda.reset_peak_memory_stats()


def report_step(ctx: Context, made: Setup, what: str, gradients: Callable, items: list) -> float:
    """Rows about one variant; seconds of its step."""
    steps, warmup = (10, 3) if ctx.gpu else (2, 1)
    reset_peak(ctx)
    seconds = ctx.seconds(whole_step(made, gradients), steps, warmup)
    tokens = sum(len(item.row.input_ids) for item in items)
    ctx.measured(f"{what}: samples a second", len(items) / seconds)
    ctx.measured(f"{what}: tokens a second", tokens / seconds, "", "padding is not counted")
    if ctx.gpu:
        ctx.measured(f"{what}: peak memory", torch.cuda.max_memory_allocated() / 1e9, "GB")
    flops, peak = made.trainer.task.family.step_flops(items, made.trainer.task.stage), peak_flops(ctx.device)
    if peak:
        ctx.measured(f"{what}: MFU", 100 * flops / seconds / peak, "%", f"{flops / 1e12:.2f} TFLOPs a step")
    else:
        ctx.measured(f"{what}: FLOP/s", flops / seconds / 1e12, "TFLOP/s", "the peak of this device is not known")
    return seconds


def check_build(ctx: Context) -> None:
    """What comes before the first step."""
    made = setup(ctx.device)
    parameters = sum(p.numel() for p in made.trainer.model.parameters())
    ctx.measured(f"{made.name}: parameters", parameters / 1e6, "million")
    for what, seconds in made.seconds.items():
        ctx.measured(what, seconds, "s")
    elsewhere = [n for n, p in made.trainer.model.named_parameters() if p.device.type != ctx.device.type]
    ctx.at_most("parameters on another device", len(elsewhere), 0)


def check_step(ctx: Context) -> None:
    """A step of stage II in bfloat16: with and without packing, with and without stored features."""
    made, times = setup(ctx.device), {}
    for cached, items in ((False, made.pixels), (True, made.stored)):
        for packed, variant in ((False, padded_gradients), (True, packed_gradients)):
            name = f"{'packed' if packed else 'padded'}, {'stored features' if cached else 'pixels'}"
            gradients = variant(made, items)
            times[packed, cached] = report_step(ctx, made, name, gradients, items)
    ctx.measured("packed with stored features over padded with pixels", times[False, False] / times[True, True],
                 "times as fast")
    gain = times[False, True] / times[True, True]
    if ctx.gpu:
        ctx.at_least("packing, with stored features", gain, 0.95, "times as fast")
    else:  # too few and too noisy steps to judge
        ctx.measured("packing, with stored features", gain, "times as fast")


def check_options(ctx: Context) -> None:
    """What changes the speed or memory of the packed step with stored features, and not its result."""
    made = setup(ctx.device)
    model, gradients = made.trainer.model, packed_gradients(made, made.stored)
    report_step(ctx, made, "as it is", gradients, made.stored)
    try:
        recompute_activations(model)
        report_step(ctx, made, "recomputed activations", gradients, made.stored)
    finally:
        recompute_activations(model, False)
    if not ctx.gpu:
        ctx.skip("channels_last, cudnn.benchmark and larger batches", "of interest on a GPU only")
        return
    model.unet.to(memory_format=torch.channels_last)
    report_step(ctx, made, "U-Net in channels_last", gradients, made.stored)
    torch.backends.cudnn.benchmark = True
    report_step(ctx, made, "and cudnn.benchmark", gradients, made.stored)
    torch.backends.cudnn.benchmark = False
    model.unet.to(memory_format=torch.contiguous_format)
    four = [replace(item, order=(i, *item.order)) for i in range(4) for item in made.stored]
    larger = packed_gradients(made, four)
    report_step(ctx, made, "four times the documents", larger, four)


def shuffled(items: list, keep: int) -> list:
    return items[:keep] if keep <= len(items) else items + items[: keep - len(items)]


def check_compile(ctx: Context) -> None:
    """Compiled decoder layers (`Settings.compile`): the compile time apart from what a step gains."""
    made = setup(ctx.device)
    trainer, items = made.trainer, made.stored
    layers = trainer.task.family.decoder_layers()
    steps, warmup = (10, 2) if ctx.gpu else (2, 1)
    gradients = packed_gradients(made, items)
    plain = ctx.seconds(whole_step(made, gradients), steps, warmup)
    value = lambda: trainer.gradients([packed_batch(made, items)])[0]["lm"]
    total, n = value()
    torch._dynamo.reset()
    try:
        for layer in layers:  # on a CPU traced and differentiated, but no kernels are built: that takes minutes
            layer.compile() if ctx.gpu else layer.compile(backend="aot_eager")
        ctx.sync()
        began = time.time()
        compiled_total, _ = value()
        ctx.sync()
        ctx.measured("first step", time.time() - began, "s", "compiles" if ctx.gpu else "backend aot_eager")
        ctx.at_most("lm loss, relative difference", abs(compiled_total / total - 1), 0.01)
        seconds = ctx.seconds(whole_step(made, gradients), steps, warmup)
        ctx.measured("a compiled step", plain / seconds, "times as fast", f"{1e3 * plain:.1f} ms without")
        seen = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        began = time.time()
        for keep in (3, 5, 6, 7) if ctx.gpu else (3,):  # rows of other numbers and lengths, as every step has them
            trainer.gradients([packed_batch(made, shuffled(items, keep))])
        ctx.sync()
        ctx.measured("steps of other shapes", time.time() - began, "s")
        more = torch._dynamo.utils.counters["stats"]["unique_graphs"] - seen
        ctx.at_most("graphs that were compiled for them", more, 4)
    finally:
        for layer in layers:
            layer._compiled_call_impl = None
        torch._dynamo.reset()


def check_memory(ctx: Context) -> None:
    """The peak of a step against the planner's figure for the same configuration, a single process."""
    from dreamllm_edu.planning import picture_batch, plan_stage, token_batch

    made = setup(ctx.device)
    trainer, config = made.trainer, made.trainer.model.config
    length, micro_batch = (512, 8) if ctx.gpu else (64, 2)
    stage = replace(made_stage(), trains=TRAINED)
    began = time.time()
    planned = plan_stage(config, stage, 1, 1e12, micro_batch, "bf16", False, "single", length=length).total
    ctx.measured("planned", planned / 1e9, "GB", f"in {time.time() - began:.0f} s")
    if not ctx.gpu:
        ctx.skip("used", "only a GPU counts the memory of its tensors")
        return
    pictures = picture_batch(config, micro_batch, torch.float32)
    batch = {**token_batch(config, micro_batch, length), **{name: t.normal_() for name, t in pictures.items()}}
    batch["timesteps"] = torch.full((micro_batch,), 500)
    batch["condition_drop_mask"] = torch.zeros(micro_batch, dtype=torch.bool)
    batch = {name: tensor.to(ctx.device) for name, tensor in batch.items()}

    def gradients() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = trainer.model(**batch, labelled_only=True).loss
        loss.backward()

    torch.cuda.empty_cache()
    reset_peak(ctx)
    for _ in range(2):
        whole_step(made, gradients)()
    used = torch.cuda.max_memory_allocated()
    ctx.measured("used", used / 1e9, "GB", f"{micro_batch} documents of {length} tokens, one picture each")
    ctx.measured("reserved by the allocator", torch.cuda.max_memory_reserved() / 1e9, "GB")
    ctx.within("planned over used", planned / used, 0.9, 1.3)


def check_syncs(ctx: Context) -> None:
    """How often the CPU waits for the GPU in a step, and where."""
    if not ctx.gpu:
        raise Skip("a CPU waits for nothing")
    made = setup(ctx.device)
    gradients = packed_gradients(made, made.stored)
    for what, call in (("gradients of a packed step", gradients), ("a whole step", whole_step(made, gradients))):
        call()
        ctx.sync()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as waits:
                warnings.simplefilter("always")
                call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        places = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in waits if "synchroniz" in str(w.message))
        top = ", ".join(f"{place} {n}" for place, n in places.most_common(6))
        ctx.measured(f"{what}: waits", sum(places.values()), "", top)


def check_loop(ctx: Context) -> None:
    """The trainer's loop with its data, against the same steps with the data at hand."""
    made, task = setup(ctx.device), setup(ctx.device).trainer.task
    steps = 8 if ctx.gpu else 2
    alone = ctx.seconds(whole_step(made, packed_gradients(made, made.pixels)), steps, 2)
    settings = task.settings
    try:
        for workers in (0, 4):
            task.settings = replace(settings, workers=workers)
            stream = task.steps(0, {})
            times = []
            for step in range(steps + 3):
                began = time.perf_counter()
                batches, _, documents = next(stream)
                made.trainer.step(step + 1, batches)
                ctx.sync()
                times.append(time.perf_counter() - began)
            median = sorted(times[3:])[len(times[3:]) // 2]
            ctx.measured(f"{workers} loading processes: samples a second", documents["documents"] / median)
            ctx.measured(f"{workers} loading processes: time of a step over that without loading", median / alone)
            del stream
    finally:
        task.settings = settings


def check_frozen_bf16(ctx: Context) -> None:
    """After a training in bfloat16 the frozen parts are in bfloat16 and the rest in float32: the model still writes,
    reads and draws."""
    from correctness import prompts, tiny_family

    family = tiny_family(ctx.device)
    for part in family.frozen_parts:
        getattr(family.model, part).to(torch.bfloat16)
    for what, parts, options in (
        ("reads a picture", prompts()[1].parts, {"max_new_tokens": 4, "max_pictures": 0}),
        ("draws", ["a cat:", Dream()], {"max_new_tokens": 0, "num_inference_steps": 2}),
    ):
        try:
            family.model.generate(Document(parts), family.processor, **options)
            ctx.at_most(f"{what}: errors", 0, 0)
        except RuntimeError as error:
            ctx._row(f"{what}: errors", 1, "", "<= 0", "fail", " ".join(str(error).split())[:120])


@torch.no_grad()
def bare_tokens(model: torch.nn.Module, rows: int, tokens: int) -> None:
    """The language model alone, greedy, with transformers' own cache."""
    ids, cache = torch.full((rows, 8), 9, device=model.device), None
    for _ in range(tokens):
        out = model(input_ids=ids, past_key_values=cache, use_cache=True)
        ids, cache = out.logits[:, -1:].argmax(-1), out.past_key_values


def check_tokens(ctx: Context) -> None:
    """Greedy text, one prompt and eight, against the language model alone in a loop."""
    made, tokens = setup(ctx.device), 32 if ctx.gpu else 8
    family, repeats = made.trainer.task.family, 3 if ctx.gpu else 1
    with torch.autocast(ctx.device.type, torch.bfloat16):
        for rows in (1, 8):
            documents = [Document(["a red cat in Noto style: "])] * rows
            written = lambda: family.model.generate(documents, family.processor, tokens, 0)  # noqa: B023
            bare = lambda: bare_tokens(family.model.eval().language_model, rows, tokens)  # noqa: B023
            seconds, alone = ctx.seconds(written, repeats, 1), ctx.seconds(bare, repeats, 1)
            ctx.measured(f"{rows} prompts: tokens a second", rows * tokens / seconds)
            ctx.measured(f"{rows} prompts: time over that of the language model alone", seconds / alone)
    family.model.train()


def check_drawing(ctx: Context) -> None:
    """Pictures with 20 steps of DDIM and guidance, against the bare calls of U-Net and VAE."""
    made = setup(ctx.device)
    family, model, rows = made.trainer.task.family, made.trainer.model, 4
    documents, steps = [Document([f"cat {i}: ", Dream()]) for i in range(rows)], 20 if ctx.gpu else 2
    config = model.unet.config
    shape = (config.in_channels, config.sample_size, config.sample_size)
    noise = torch.randn(2 * rows, *shape, device=ctx.device, dtype=model.unet.dtype)
    context = torch.randn(2 * rows, model.config.num_queries, config.cross_attention_dim, device=ctx.device)

    @torch.no_grad()
    def bare() -> None:
        for t in torch.linspace(999, 0, steps, device=ctx.device).long():
            model.unet(noise, t, encoder_hidden_states=context.to(noise.dtype))
        decode_latents(model.vae, noise[:rows])

    with torch.autocast(ctx.device.type, torch.bfloat16):
        draw = lambda: family.generate(documents, max_new_tokens=0, num_inference_steps=steps)
        seconds, alone = ctx.seconds(draw, 3 if ctx.gpu else 1, 1), ctx.seconds(bare, 3 if ctx.gpu else 1, 1)
    side = config.sample_size * 8
    ctx.measured(f"pictures of {side} x {side} a second, {steps} steps", rows / seconds)
    ctx.measured("time over that of the bare calls", seconds / alone)
    model.train()


CHECKS = {
    "frozen_bf16": (check_frozen_bf16, 20),
    "build": (check_build, 60),
    "step": (check_step, 60),
    "options": (check_options, 45),
    "loop": (check_loop, 45),
    "syncs": (check_syncs, 20),
    "tokens": (check_tokens, 30),
    "drawing": (check_drawing, 30),
    "memory": (check_memory, 60),
    "compile": (check_compile, 75),
}
