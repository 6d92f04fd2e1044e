"""A disk that is full at a random byte: is what was there whole, and does the message say what to do?

Two kinds of full disk. A small file system in memory (tmpfs) whose free space is used up but for a random number of
pages: this needs the right to mount, as root has it. And a limit of the process (RLIMIT_FSIZE): no file can grow
beyond a random number of bytes. Each writer writes over what it wrote before. Afterwards the files are either the
old ones, bit by bit, or the new ones; no other file is left; an error is an `OSError` with a message. Then there is
space again, and the same call succeeds."""

import contextlib
import io
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from . import file_limit, fingerprint, row

PAGE = 4096
SIZE = 24 * 2**20  # bytes of the small file system


class SmallDisk:
    """A tmpfs on `folder`; `None` from `of` where mounting is not allowed."""

    def __init__(self, folder: Path):
        self.folder = folder

    @classmethod
    def of(cls, folder: Path) -> "SmallDisk | None":
        if not sys.platform.startswith("linux"):
            return None
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True)
        except OSError:
            return None
        return cls(folder) if done.returncode == 0 else None

    def close(self) -> None:
        subprocess.run(["umount", str(self.folder)], check=True)

    def free(self) -> int:
        import os

        state = os.statvfs(self.folder)
        return state.f_bavail * state.f_frsize

    @contextmanager
    def full_but(self, left: int) -> Iterator[None]:
        """Within it only `left` bytes are free, whole pages."""
        filler = self.folder / "filler"
        with filler.open("wb") as file:
            block = bytes(PAGE)
            for _ in range(max(0, self.free() - left) // PAGE):
                file.write(block)
        try:
            yield
        finally:
            filler.unlink()


class Writer:
    """Something that saves: `write(folder, version)` for version 0 (old) and 1 (new); `read(folder)` uses what is there
    and raises if it is not whole."""

    def __init__(self, name: str, write: Callable, read: Callable):
        self.name, self.write, self.read = name, write, read


def models() -> list[Writer]:
    """Writers of weights, processors and trainings."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from dreamllm_edu.models.dreamllm import DreamLLM, DreamLLMProcessor
    from dreamllm_edu.models.dreamllm.weights import load_trained, save_trained
    from dreamllm_edu.parts.loading import quiet
    from dreamllm_edu.parts.tokenizer import train_tokenizer
    from dreamllm_edu.training.trainer import train_part

    from conftest import make_tiny

    pair = [make_tiny(0), make_tiny(1)]
    images = CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    tokenizers = [train_tokenizer(["a red cat in Noto style:", text], 300) for text in ("one dog", "two dogs sit")]
    processors = [DreamLLMProcessor(images, tokenizer, num_queries=4, num_patches=16) for tokenizer in tokenizers]

    def save_model(folder, version):
        with quiet():
            pair[version].save_pretrained(folder / "model")

    def train(folder, version):
        """The old state is after two steps, the new one at the end; the folder keeps the newest checkpoint."""
        torch.manual_seed(0)
        layer = torch.nn.Linear(60, 60)

        def stop(step, trainer):
            if step == 1 and version == 0:
                raise InterruptedError

        loss = lambda m, s, g: {"loss": m(torch.randn(4, 60, generator=g)).square().mean()}
        with contextlib.suppress(InterruptedError if version == 0 else ()):
            train_part(
                layer,
                loss,
                4,
                1e-3,
                folder=folder / "run",
                warmup=1,
                precision="no",
                save_every=2,
                progress=False,
                on_step=stop,
            )
        folder.joinpath("run").mkdir(exist_ok=True)
        if version == 1 and not torch.equal(layer.weight, uninterrupted()):
            raise AssertionError("the resumed training ends with other weights")

    def uninterrupted(kept=[]):  # noqa: B006  computed once
        if not kept:
            torch.manual_seed(0)
            layer = torch.nn.Linear(60, 60)
            loss = lambda m, s, g: {"loss": m(torch.randn(4, 60, generator=g)).square().mean()}
            train_part(layer, loss, 4, 1e-3, warmup=1, precision="no", progress=False)
            kept.append(layer.weight.detach().clone())
        return kept[0]

    def read_run(folder):
        from dreamllm_edu.training.checkpoint import last_checkpoint

        if last_checkpoint(folder / "run", report=lambda text: None)[1] is None:
            raise AssertionError("no whole checkpoint is left")

    return [
        Writer("model.save_pretrained", save_model, lambda folder: DreamLLM.from_pretrained(folder / "model")),
        Writer(
            "processor.save_pretrained",
            lambda folder, version: processors[version].save_pretrained(folder / "p"),
            lambda folder: DreamLLMProcessor.from_pretrained(folder / "p"),
        ),
        Writer(
            "save_trained",
            lambda folder, version: save_trained(pair[version], folder / "t.safetensors"),
            lambda folder: load_trained(make_tiny(2), folder / "t.safetensors"),
        ),
        Writer("a training's checkpoint", train, read_run),
    ]


def documents(folder: Path) -> list[Writer]:
    """Writers of documents and of stored features. `folder`: for what they read, on a disk that has space."""
    from dreamllm_edu.documents.document import Document
    from dreamllm_edu.documents.formats import read_jsonl, write_jsonl
    from dreamllm_edu.parts.loading import quiet
    from dreamllm_edu.training.features import FeatureStore

    from conftest import make_tiny, picture

    pages = [[Document([f"page {i}", picture(10 * version + i)]) for i in range(4)] for version in (0, 1)]
    model = make_tiny()
    with quiet():
        model.save_pretrained(folder / "model")
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from dreamllm_edu.models.dreamllm import DreamLLMProcessor
    from dreamllm_edu.parts.tokenizer import train_tokenizer

    images = CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    tokenizer = train_tokenizer(["a red cat in Noto style:"] * 4, 300)
    DreamLLMProcessor(images, tokenizer, num_queries=4, num_patches=16, max_length=256).save_pretrained(
        folder / "model"
    )
    for version in (0, 1):
        write_jsonl(pages[version], folder / f"prompt-{version}.jsonl")

    def generate(out, version):
        from dreamllm_edu.app.cli import main

        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            code = main(
                [
                    "generate",
                    str(folder / f"prompt-{version}.jsonl"),
                    "--model",
                    str(folder / "model"),
                    "--out",
                    str(out / f"page{ending_of(out)}"),
                    "--max-new-tokens",
                    "1",
                ]
            )
        if code:
            last = said.getvalue().strip().splitlines()[-1]
            raise OSError(last) if code == 1 and last.startswith("dreamllm-edu:") else AssertionError(last)

    def ending_of(out):
        """Each of the formats in turn, by the number of the folder."""
        return (".html", ".md", ".jsonl")[int(re.search(r"\d*$", out.name)[0] or 0) % 3]

    def read_page(out):
        text = (out / f"page{ending_of(out)}").read_text(encoding="utf8")
        if ending_of(out) == ".jsonl":
            read_jsonl(out / "page.jsonl")
        elif "page 3" not in text:
            raise AssertionError("the last document is not there")

    def store(out, version):
        made = FeatureStore(out / "store", "x")
        made.add("clip", [f"{version}-{i}" for i in range(8)], torch.full((8, 4, 64), float(version)))

    def read_store(out):
        """All of the old pictures, or all of both, and each with its own values."""
        made, n = FeatureStore(out / "store", "x"), []
        for version in (0, 1):
            keys = [type("Key", (), {"key": f"{version}-{i}"}) for i in range(8)]
            tensors = [made.read("clip", [key]) for key in keys]
            n.append(sum(tensor is not None for tensor in tensors))
            if any(tensor is not None and bool((tensor != version).any()) for tensor in tensors):
                raise AssertionError("stored features have other values")
        if n[0] != 8 or n[1] not in (0, 8):
            raise AssertionError(f"of 8 old and 8 new pictures {n} are found")

    return [
        Writer("generate --out page.html, .md or .jsonl", generate, read_page),
        Writer("feature store", store, read_store),
    ]


def attempt(writer: Writer, out: Path, full: Callable) -> tuple[str, str | None]:
    """Write the old version, the new one on the full disk, and again when there is space. ('written' or 'refused',
    what is wrong or None)."""
    writer.write(out, 0)
    before, loose = fingerprint(out), writer.name == "feature store"
    ending, wrong = "written", None
    try:
        with full():
            writer.write(out, 1)
    except OSError as error:
        ending = "refused"
        wrong = None if len(str(error).split()) > 3 else f"unclear message {str(error)!r}"
    except Exception as error:
        ending, wrong = "refused", f"{type(error).__name__}: {str(error)[:120]}"
    now = fingerprint(out)
    if wrong:
        pass
    elif ending == "refused" and writer.name == "a training's checkpoint":
        kept = {name: mark for name, mark in before.items() if name.startswith("run/step-")}
        wrong = None if kept.items() <= now.items() else "the checkpoint before is not whole"
        wrong = wrong or next((f"{name} is left" for name in now if ".part" in name or ".step" in name), None)
    elif ending == "refused" and not loose and now != before:
        wrong = f"changed: {sorted(before.items() ^ now.items())[0][0]}"
    try:
        writer.read(out)
        writer.write(out, 1)
        writer.read(out)
    except Exception as error:
        wrong = wrong or f"afterwards {type(error).__name__}: {str(error)[:120]}"
    return ending, wrong


def sizes(writer: Writer, out: Path) -> tuple[int, int]:
    """(bytes of all files, of the largest file) of what a writer writes."""
    writer.write(out, 0)
    files = [path.stat().st_size for path in out.rglob("*") if path.is_file()]
    return sum(files), max(files)


def run(folder: Path, quick: bool, seed: int) -> list[dict]:
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(1)
    disk, dice, rows = SmallDisk.of(folder / "disk"), random.Random(seed), []
    (folder / "source").mkdir()
    writers, moments = models() + documents(folder / "source"), 2 if quick else 20
    try:
        for writer in writers:
            whole = folder / f"whole-{writers.index(writer)}"
            whole.mkdir()
            total, largest = sizes(writer, whole)
            for kind in ("small disk", "limit"):
                if kind == "small disk" and disk is None:
                    continue
                misses, refused = [], 0
                for i in range(moments):
                    # up to a little more than it needs: then the write succeeds, which is right too
                    left = dice.randrange(int((total if kind == "small disk" else largest) * 1.2))
                    out = (disk.folder if kind == "small disk" else folder) / f"{kind[:5]}-{i}"
                    out.mkdir()
                    full = (
                        (lambda left=left: disk.full_but(left))
                        if kind == "small disk"
                        else (lambda left=left: file_limit(left))
                    )
                    ending, wrong = attempt(writer, out, full)
                    refused += ending == "refused"
                    misses += [f"{left} bytes free: {wrong}"] if wrong else []
                    shutil.rmtree(out)
                what = "a small file system, full" if kind == "small disk" else "no file beyond a limit"
                rows.append(
                    row(
                        f"{writer.name}: {what} at a random byte, nothing lost",
                        moments,
                        misses,
                        f"{refused} refused, {moments - refused} had space enough",
                    )
                )
    finally:
        if disk:
            disk.close()
    return rows
