"""The same numbers on the GPU as on the CPU: losses, gradients, text, pictures, training, checkpoints."""

from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from inputs import QUICK, build_family, made_corpora, made_stage, picture, tiny_config
from measuring import Context, Skip
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from dreamllm_edu.documents.document import Document, Dream
from dreamllm_edu.files import WEIGHTS
from dreamllm_edu.models.dreamllm.family import DreamLLMFamily
from dreamllm_edu.models.dreamllm.model import DreamLLM
from dreamllm_edu.models.dreamllm.weights import mini_processor
from dreamllm_edu.training.batches import Steps, pack_items, step_stream
from dreamllm_edu.training.features import FeatureStore, fill_store, fingerprint, frozen_features
from dreamllm_edu.training.stage import Settings, set_trainable
from dreamllm_edu.training.trainer import Trainer

CPU = torch.device("cpu")


def tiny_family(device: torch.device) -> DreamLLMFamily:
    """The tiny model, drawn on the CPU so that both devices have the same weights."""
    family = build_family(tiny_config(), CPU, 256)
    family.model.to(device)
    return family


def made_items(family: DreamLLMFamily, documents: int = 8, store: FeatureStore | None = None) -> list:
    """One step's documents."""
    stage = made_stage(batch=documents)
    steps = Steps(family, family.objective(stage), stage, made_corpora(), QUICK, store=store)
    return next(step_stream(steps))[0]


def losses_and_gradients(family: DreamLLMFamily, items: list, autocast: bool = False) -> tuple[dict, dict]:
    """Mean losses by kind, and the gradient of every tensor that trains, on the CPU in float64."""
    model, device, objective = family.model.train(), family.model.device, family.objective(made_stage())
    set_trainable(model, made_stage())
    model.zero_grad()
    batch = pack_items(items, family.layout, 256, objective.extra_rows(family.layout)).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        losses, zero = objective.losses(model, batch, frozen_features(family, batch, device))
    means = {kind: values.float().mean() for kind, values in losses.items()}
    (sum(means.values()) + zero).backward()
    gradients = {name: p.grad.double().cpu() for name, p in model.named_parameters() if p.requires_grad}
    return {kind: value.item() for kind, value in means.items()}, gradients


def difference(ours: dict, reference: dict) -> float:
    """Norm of the difference of all tensors together, over the norm of the reference."""
    total = lambda tensors: sum(t.square().sum().item() for t in tensors) ** 0.5
    return total(ours[name] - reference[name] for name in reference) / total(reference.values())


def check_losses(ctx: Context) -> None:
    """Packed documents with pictures: float32 on the CPU and on the device."""
    items = made_items(tiny_family(CPU))
    losses, gradients = losses_and_gradients(tiny_family(CPU), items)
    ours, our_gradients = losses_and_gradients(tiny_family(ctx.device), items)
    for kind, value in losses.items():
        ctx.at_most(f"{kind} loss, relative difference", abs(ours[kind] / value - 1), 1e-5)
    ctx.at_most("gradients, relative difference", difference(our_gradients, gradients), 1e-4)
    worst = max(difference({n: our_gradients[n]}, {n: g}) for n, g in gradients.items() if g.abs().max() > 1e-7)
    ctx.at_most("gradient of the worst tensor, relative difference", worst, 1e-3)


def check_bf16(ctx: Context) -> None:
    """bfloat16 as the trainer uses it (frozen parts in bfloat16 on a GPU), against float32."""
    items = made_items(tiny_family(CPU))
    family = tiny_family(ctx.device)
    losses, gradients = losses_and_gradients(family, items)
    family.prepare(precision="bf16")
    if not ctx.gpu:  # as a GPU has them: the mixture of types is tried here too
        for name in family.frozen_parts:
            getattr(family.model, name).to(torch.bfloat16)
    ours, our_gradients = losses_and_gradients(family, items, autocast=True)
    for kind, value in losses.items():
        ctx.at_most(f"{kind} loss, relative difference", abs(ours[kind] / value - 1), 0.02)
    flat = lambda tensors: torch.cat([t.flatten() for _, t in sorted(tensors.items())])
    cosine = torch.cosine_similarity(flat(gradients), flat(our_gradients), 0).item()
    ctx.at_least("gradients, cosine", cosine, 0.99)
    kinds = {p.dtype for name in family.frozen_parts for p in getattr(family.model, name).parameters()}
    ctx.at_most("types of the frozen parts beside bfloat16", len(kinds - {torch.bfloat16}), 0)


def writing_model(device: torch.device) -> tuple[DreamLLM, object, str]:
    """The trained miniature if its weights are there, else the tiny model with random ones."""
    if (WEIGHTS / "mini" / "unet" / "diffusion_pytorch_model.safetensors").exists():
        return DreamLLM.from_pretrained("mini").to(device), mini_processor(), "trained miniature"
    family = tiny_family(device)
    return family.model, family.processor, "random weights"


def prompts() -> list[Document]:
    """Of different lengths, with and without a picture to read."""
    return [
        Document(["red apple in Noto style:"]),
        Document(["User: what is this?", picture(1), "\nAssistant:"]),
        Document(["a very long prompt about a cat, a dog and a blue bird that flies over the house: "]),
    ]


def check_text(ctx: Context) -> None:
    """Greedy text of a batch, token by token through the cache."""
    answers = {}
    for device in (CPU, ctx.device):
        model, processor, which = writing_model(device)
        answers[device] = [a.text for a in model.generate(prompts(), processor, max_new_tokens=16, max_pictures=0)]
    different = sum(a != b for a, b in zip(answers[CPU], answers[ctx.device]))
    ctx.at_most(f"answers that differ from the CPU's, of {len(prompts())} ({which})", different, 0)
    model, processor, _ = writing_model(ctx.device)
    single = [model.generate(p, processor, max_new_tokens=16, max_pictures=0).text for p in prompts()]
    ctx.at_most("answers that depend on their neighbours", sum(a != b for a, b in zip(answers[ctx.device], single)), 0)


def drawn(model: DreamLLM, processor: object) -> np.ndarray:
    """Two pictures as grey levels [2, H, W, 3]. Their noise is drawn on the CPU, whatever the device."""
    documents = [Document(["red apple in Noto style:", Dream()]), Document(["blue car:", Dream()])]
    answers = model.generate(documents, processor, max_new_tokens=0, num_inference_steps=8, seed=3)
    return np.stack([np.asarray(a.pictures[0], dtype=np.float32) for a in answers])


def check_pictures(ctx: Context) -> None:
    """Pictures with the same noise, in grey levels of 255."""
    model, processor, which = writing_model(CPU)
    reference = drawn(model, processor)
    model.to(ctx.device)
    apart = np.abs(drawn(model, processor) - reference)
    ctx.at_most(f"float32, largest difference ({which})", apart.max(), 2, "grey levels")
    ctx.at_most("float32, mean difference", apart.mean(), 0.1, "grey levels")
    low = np.abs(drawn(model.to(torch.bfloat16), processor) - reference)
    ctx.at_most("bfloat16, mean difference", low.mean(), 12, "grey levels")


def check_cache(ctx: Context) -> None:
    """Features that are stored and read give the losses of features that are computed in the step."""
    family = tiny_family(ctx.device)
    store = FeatureStore(ctx.folder, fingerprint(family), torch.float32)
    fill_store(store, family, made_corpora())
    losses, gradients = losses_and_gradients(family, made_items(family))
    stored = made_items(family, store=store)
    ours, our_gradients = losses_and_gradients(family, stored)
    ctx.at_most("pictures that were not found", sum(len(item.pixels) for item in stored), 0)
    for kind, value in losses.items():
        ctx.at_most(f"{kind} loss, relative difference", abs(ours[kind] / value - 1), 1e-5)
    ctx.at_most("gradients, relative difference", difference(our_gradients, gradients), 1e-4)
    half = FeatureStore(ctx.folder / "half", fingerprint(family))
    fill_store(half, family, made_corpora())
    rounded, _ = losses_and_gradients(family, made_items(family, store=half))
    worst = max(abs(rounded[kind] / value - 1) for kind, value in losses.items())
    ctx.at_most("stored in half precision, worst loss", worst, 0.01)


def trainer_of(family, folder=None, settings: Settings = QUICK, stop: int = 0, **stage) -> Trainer:
    """A trainer of a few steps of stage II; `stop`: interrupt it after so many."""

    def interrupt(step: int, trainer: Trainer) -> None:
        if step + 1 == stop:
            raise KeyboardInterrupt

    return Trainer.of_stage(
        family,
        made_stage(**stage),
        made_corpora(),
        folder,
        settings,
        progress=False,
        on_step=interrupt if stop else None,
    )


def trained_weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    whole = lambda p: trainer.strategy.gather(p).detach().double().cpu()
    return {name: whole(p) for name, p in trainer.trained.items()}


def train(device: torch.device, folder=None, settings: Settings = QUICK, stop: int = 0, **stage):
    """The rows of the log and the weights of a short training."""
    trainer = trainer_of(tiny_family(device), folder, settings, stop, **stage)
    try:
        rows = trainer.train()
    except KeyboardInterrupt:
        rows = []
    return rows, trained_weights(trainer)


def compare_logs(ctx: Context, what: str, rows: list, reference: list, limit: float) -> None:
    apart = [abs(a[key] / b[key] - 1) for a, b in zip(rows, reference, strict=True) for key in ("lm", "image", "norm")]
    ctx.at_most(f"{what}: losses and norms of {len(rows)} steps, largest relative difference", max(apart), limit)


def check_trainer(ctx: Context) -> None:
    """Four steps of stage II in float32, on both devices; micro-batches and recomputation change nothing."""
    rows, _ = train(CPU)
    ours, weights = train(ctx.device)
    compare_logs(ctx, "CPU and device", ours, rows, 1e-3)
    pieces, _ = train(ctx.device, settings=replace(QUICK, micro_batch=1))
    compare_logs(ctx, "micro-batches of one", pieces, ours, 1e-3)
    again, _ = train(ctx.device, settings=replace(QUICK, checkpointing=True))
    compare_logs(ctx, "recomputed activations", again, ours, 1e-3)
    loaded, _ = train(ctx.device, settings=replace(QUICK, workers=2))
    compare_logs(ctx, "two loading processes", loaded, ours, 1e-3)
    low, _ = train(ctx.device, settings=replace(QUICK, precision="bf16"))
    compare_logs(ctx, "bfloat16", low, ours, 0.1)
    ctx.measured("memory that the log reports", ours[-1]["memory_mb"], "MB")


def check_checkpoints(ctx: Context) -> None:
    """Two steps on one device, the rest on the other: read exactly, and the training is the same."""
    reference, _ = train(CPU)
    for first, then, what in ((ctx.device, CPU, "GPU to CPU"), (CPU, ctx.device, "CPU to GPU")):
        folder = ctx.folder / what.replace(" ", "-")
        _, written = train(first, folder, stop=2)
        trainer = trainer_of(tiny_family(then), folder)
        trainer.start()
        read = trained_weights(trainer)
        ctx.at_most(f"{what}: tensors that changed", sum(not torch.equal(read[n], written[n]) for n in written), 0)
        moments = [s[key].device.type for s in trainer.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
        ctx.at_most(f"{what}: moments on the wrong device", sum(kind != then.type for kind in moments), 0)
        rows, _ = train(then, folder)
        compare_logs(ctx, what, rows, reference, 1e-3)


def check_resume(ctx: Context) -> None:
    """A training that was interrupted ends with the weights of one that was not, bit by bit."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.deterministic = True
    try:
        for precision in ("no", "bf16"):
            settings, folder = replace(QUICK, precision=precision), ctx.folder / precision
            _, whole = train(ctx.device, settings=settings, ema_decay=0.9)
            _, again = train(ctx.device, settings=settings, ema_decay=0.9)
            repeats = difference(again, whole)
            train(ctx.device, folder, settings, stop=2, ema_decay=0.9)
            _, resumed = train(ctx.device, folder, settings, ema_decay=0.9)
            ctx.at_most(f"{precision}: two uninterrupted runs", repeats, 0)
            ctx.at_most(f"{precision}: interrupted and resumed", difference(resumed, whole), 2 * repeats)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False


def check_fsdp2(ctx: Context) -> None:
    """FSDP2 with one rank: the losses of a single process, whose checkpoint it reads."""
    if not dist.is_available():
        raise Skip("this torch has no torch.distributed")
    reference, weights = train(ctx.device)
    train(ctx.device, ctx.folder / "single", stop=2)
    backend = "nccl" if ctx.gpu else "gloo"
    given = {"device_id": torch.device("cuda", 0)} if ctx.gpu else {}
    dist.init_process_group(backend, init_method=f"file://{ctx.folder}/meeting", rank=0, world_size=1, **given)
    try:
        settings = replace(QUICK, strategy="fsdp2")
        rows, ours = train(ctx.device, settings=settings)
        compare_logs(ctx, backend, rows, reference, 1e-3)
        ctx.at_most("weights, relative difference", difference(ours, weights), 1e-3)
        resumed, _ = train(ctx.device, ctx.folder / "single", settings)
        compare_logs(ctx, "resumed from a single process", resumed, reference, 1e-3)
        low, _ = train(ctx.device, settings=replace(settings, precision="bf16"))
        compare_logs(ctx, "bfloat16", low, reference, 0.1)
    finally:
        dist.destroy_process_group()


def packed_mask(length: int, documents: int, device: torch.device) -> torch.Tensor:
    """Boolean [1, 1, T, T]: causal, within documents of equal length."""
    at = torch.arange(length, device=device)
    same = (at[:, None] * documents // length) == (at[None] * documents // length)
    return (same & (at[:, None] >= at[None]))[None, None]


def attention(kernel: SDPBackend, inputs: list, mask, gradient: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients of one kernel; `RuntimeError` if it does not take these inputs."""
    given = [t.detach().clone().requires_grad_() for t in inputs]
    with sdpa_kernel(kernel):
        out = scaled_dot_product_attention(*given, attn_mask=mask, is_causal=mask is None)
        out.backward(gradient.to(out.dtype))
    return [out.detach(), *(t.grad for t in given)]


def check_attention(ctx: Context) -> None:
    """Every kernel of `scaled_dot_product_attention` in bfloat16, forward and backward, against matrix products in
    float32: causal without a mask, and with the mask of packed rows. The errors are measured in those of plain
    bfloat16 matrix products."""
    shape = (4, 15, 1024, 64) if ctx.gpu else (2, 2, 128, 16)
    random = torch.Generator().manual_seed(0)
    *inputs, gradient = (torch.randn(shape, generator=random).to(ctx.device) for _ in range(4))
    error = lambda ours, exact: max(((a.float() - b).norm() / b.norm()).item() for a, b in zip(ours, exact))
    for kind, mask in (("causal", None), ("packed", packed_mask(shape[2], 4, ctx.device))):
        exact = attention(SDPBackend.MATH, inputs, mask, gradient)
        low = [t.bfloat16() for t in inputs]
        plain = error(attention(SDPBackend.MATH, low, mask, gradient), exact)
        for name in ("MATH", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"):
            kernel = getattr(SDPBackend, name)
            call = lambda: attention(kernel, low, mask, gradient)  # noqa: B023
            try:
                ours = call()
            except RuntimeError as refused:
                ctx.skip(f"{kind}, {name.lower()}", f"not for these inputs ({' '.join(str(refused).split())[:80]})")
                continue
            ctx.at_most(f"{kind}, {name.lower()}: error over that of bf16 math", error(ours, exact) / plain, 2)
            ctx.measured(f"{kind}, {name.lower()}: forward and backward", 1e3 * ctx.seconds(call, 5, 2), "ms")


def check_implementations(ctx: Context) -> None:
    """Each `attn_implementation` that is installed gives packed rows the hidden states of "eager"."""
    family = tiny_family(ctx.device)
    model, objective = family.model, family.objective(made_stage())
    batch = pack_items(made_items(family), family.layout, 256, objective.extra_rows(family.layout)).to(ctx.device)
    decoder, states = model.language_model, {}
    for name in ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3"):
        if name == "flex_attention" and not ctx.gpu:
            ctx.skip(name, "compiling it takes minutes on a CPU")
            continue
        low = torch.bfloat16 if name.startswith("flash") else torch.float32
        try:
            decoder.set_attn_implementation(name)
            with torch.no_grad(), torch.autocast(ctx.device.type, low, enabled=low == torch.bfloat16):
                embedded = model.get_input_embeddings()(batch.input_ids).to(low)
                states[name] = decoder.model(
                    inputs_embeds=embedded, position_ids=batch.position_ids, use_cache=False
                ).last_hidden_state.float()
        except (ImportError, ValueError) as error:
            ctx.skip(name, " ".join(str(error).split())[:120])
            continue
        apart = (states[name] - states["eager"]).norm() / states["eager"].norm()
        ctx.at_most(f"{name}, {len(batch.input_ids)} packed rows: relative difference", apart.item(), 2e-2 if
                    low == torch.bfloat16 else 1e-4)


CHECKS = {
    "losses": (check_losses, 30),
    "bf16": (check_bf16, 30),
    "text": (check_text, 30),
    "pictures": (check_pictures, 30),
    "cache": (check_cache, 30),
    "trainer": (check_trainer, 45),
    "checkpoints": (check_checkpoints, 30),
    "resume": (check_resume, 40),
    "fsdp2": (check_fsdp2, 40),
    "attention": (check_attention, 20),
    "implementations": (check_implementations, 45),
}
