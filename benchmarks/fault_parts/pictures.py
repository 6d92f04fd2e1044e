"""1,000 damaged and odd pictures in documents, corpora and training: each is read or refused, none shifts another.

Every picture shows its own number as a code of black and white fields, and the text beside it says the number. After
reading, the number in the picture has to be that of the text; for pictures whose bytes were changed (where a code
may be damaged) the pixels have to be those of the same bytes opened alone. A third of the pictures in each document,
page and conversation is sound."""

import base64
import io
import json
import random
import re
import struct
import tarfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from . import row

FIELD, COLUMNS, BITS = 16, 4, 12  # pixels of a field; 4 x 3 fields


def coded(number: int) -> Image.Image:
    """64 x 64: twelve fields, black for 0 and white for 1, above a grey strip."""
    pixels = np.full((64, 64, 3), 128, np.uint8)
    for bit in range(BITS):
        y, x = bit // COLUMNS * FIELD, bit % COLUMNS * FIELD
        pixels[y : y + FIELD, x : x + FIELD] = 255 * (number >> bit & 1)
    return Image.fromarray(pixels)


def number_in(picture: Image.Image) -> int | None:
    """The number that a picture shows, or None where a field is neither black nor white."""
    values = np.asarray(picture.convert("L").resize((64, 64), Image.Resampling.NEAREST), dtype=float)
    number = 0
    for bit in range(BITS):
        y, x = bit // COLUMNS * FIELD, bit % COLUMNS * FIELD
        value = values[y + 4 : y + 12, x + 4 : x + 12].mean()
        if 80 < value < 175:
            return None
        number |= int(value > 127) << bit
    return number


def file_of(picture: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_claiming(width: int, height: int, rows: bytes = b"") -> bytes:
    """A PNG whose header claims a size; `rows` is what its compressed data unpacks to."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def flipped(data: bytes, dice: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(dice.randint(1, 12)):
        changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
    return bytes(changed)


def rotated(picture: Image.Image, dice: random.Random) -> bytes:
    note = Image.Exif()
    note[0x0112] = dice.choice([3, 6, 8])
    return file_of(picture, "JPEG", exif=note, quality=95)


def sixteen_bit(picture: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(picture.convert("L"), np.uint16) * 257)


def with_clear_border(picture: Image.Image) -> Image.Image:
    image = picture.convert("RGBA")
    alpha = np.full((64, 64), 255, np.uint8)
    alpha[48:] = 0
    image.putalpha(Image.fromarray(alpha))
    return image


def text_bomb(picture: Image.Image) -> bytes:
    """A PNG with a compressed text of 80 MB."""
    data = file_of(picture, "PNG")
    bomb = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(80 * 2**20), 9))
    return data[:33] + bomb + data[33:]


def truncated(kind: str) -> Callable:
    def make(picture, dice):
        data = file_of(picture, kind)
        return data[: dice.randrange(1, len(data) - 1)]

    return make


def changed(kind: str) -> Callable:
    return lambda picture, dice: flipped(file_of(picture, kind), dice)


# name -> (bytes from a picture and random numbers, "read", "refused" or "either", whether the number must be legible)
KINDS = {
    **{
        kind: (lambda p, d, kind=kind: file_of(p, kind), "read", True)
        for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
    },
    "CMYK JPEG": (lambda p, d: file_of(p.convert("CMYK"), "JPEG", quality=95), "read", True),
    "CMYK TIFF": (lambda p, d: file_of(p.convert("CMYK"), "TIFF"), "read", True),
    "16-bit grey PNG": (lambda p, d: file_of(sixteen_bit(p), "PNG"), "read", True),
    "16-bit grey TIFF": (lambda p, d: file_of(sixteen_bit(p), "TIFF"), "read", True),
    "one bit a pixel": (lambda p, d: file_of(p.convert("1"), "PNG"), "read", True),
    "grey with opacity": (lambda p, d: file_of(with_clear_border(p).convert("LA"), "PNG"), "read", True),
    "opacity": (lambda p, d: file_of(with_clear_border(p), "PNG"), "read", True),
    "palette with transparency": (lambda p, d: file_of(with_clear_border(p).quantize(16), "PNG"), "read", True),
    "palette GIF with transparency": (lambda p, d: file_of(with_clear_border(p), "GIF"), "read", True),
    "EXIF rotation (read as stored)": (rotated, "read", True),
    "animated GIF": (
        lambda p, d: file_of(p, "GIF", save_all=True, append_images=[coded(0), coded(4095)]),
        "read",
        True,
    ),
    "animated WebP": (
        lambda p, d: file_of(p, "WEBP", save_all=True, append_images=[coded(0)], lossless=True),
        "read",
        True,
    ),
    "animated PNG": (lambda p, d: file_of(p, "PNG", save_all=True, append_images=[coded(0)]), "read", True),
    "many pages": (lambda p, d: file_of(p, "TIFF", save_all=True, append_images=[coded(0)]), "read", True),
    "progressive JPEG": (lambda p, d: file_of(p, "JPEG", progressive=True, quality=95), "read", True),
    "no bytes": (lambda p, d: b"", "refused", False),
    "zeros": (lambda p, d: bytes(500), "refused", False),
    "noise": (lambda p, d: d.randbytes(500), "refused", False),
    "EPS": (lambda p, d: file_of(p, "EPS"), "refused", False),
    "PDF": (lambda p, d: file_of(p, "PDF"), "refused", False),
    "SVG": (lambda p, d: b'<svg xmlns="http://www.w3.org/2000/svg"><script>1</script></svg>', "refused", False),
    "a web page": (lambda p, d: b"<!doctype html><title>404</title>", "refused", False),
    "ICO": (lambda p, d: file_of(p, "ICO"), "refused", False),
    "Truevision": (lambda p, d: file_of(p, "TGA"), "refused", False),
    "claims 60,000 x 60,000": (lambda p, d: png_claiming(60_000, 60_000), "refused", False),
    "claims 2^31 - 1 x 1": (lambda p, d: png_claiming(2**31 - 1, 1), "refused", False),
    "claims no width": (lambda p, d: png_claiming(0, 5), "refused", False),
    "claims more than it has (Pillow reads black rows)": (
        lambda p, d: png_claiming(64, 64, bytes(193 * 3)),
        "either",
        False,
    ),
    "decompression bomb, 8,000 x 8,000": (lambda p, d: bomb(), "refused", False),
    "bomb in a text of a PNG": (lambda p, d: text_bomb(p), "either", False),
    # a cut behind the last pixel costs nothing: then the picture is read, and whole
    **{f"cut-off {kind}": (truncated(kind), "either", True) for kind in ("PNG", "JPEG", "WEBP")},
    **{f"cut-off {kind}": (truncated(kind), "either", False) for kind in ("GIF", "BMP", "TIFF", "PPM")},
    **{
        f"flipped bits, {kind}": (changed(kind), "either", False)
        for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
    },
}


def bomb(kept: list[bytes] = []) -> bytes:  # noqa: B006  made once
    if not kept:
        kept.append(png_claiming(8000, 8000, bytes(8000 * 24_001)))
    return kept[0]


class Case:
    """A picture by its number: bytes, kind, and what opening these bytes alone gives."""

    def __init__(self, number: int, dice: random.Random, sound: bool):
        from dreamllm_edu.documents.pictures import load_picture

        self.number = number
        self.kind = "PNG" if sound else list(KINDS)[number * 2 // 3 % len(KINDS)]
        make, self.expected, self.exact = KINDS[self.kind]
        self.data = make(coded(number), dice)
        # the right ending, or another one: what counts is what is in the file
        self.ending = "png" if sound or dice.random() < 0.5 else dice.choice(["jpg", "jpeg", "webp"])
        self.name, self.problem, began = f"{number}.{self.ending}", None, time.perf_counter()
        try:
            self.picture = load_picture(self.data)
        except ValueError as error:
            self.picture = None
            self.problem = None if len(str(error).split()) > 3 else f"unclear refusal {error}"
        except Exception as error:
            self.picture, self.problem = None, f"{type(error).__name__}: {error}"
        self.seconds = time.perf_counter() - began
        if self.picture is None and self.expected == "read" or self.picture and self.expected == "refused":
            self.problem = self.problem or f"should have been {self.expected}"
        if self.picture and self.exact and number_in(self.picture) != number:
            self.problem = f"shows {number_in(self.picture)}"

    @property
    def miss(self) -> str | None:
        return f"{self.number}, {self.kind}: {self.problem}" if self.problem else None

    def same(self, picture: Image.Image) -> bool:
        """Whether `picture` is what these bytes give."""
        return (
            self.picture is not None
            and picture.size == self.picture.size
            and picture.tobytes() == self.picture.tobytes()
        )


def groups(cases: list[Case]) -> list[list[Case]]:
    return [cases[i : i + 3] for i in range(0, len(cases), 3)]


def judged(parts: list, cases: dict[int, Case], where: str) -> list[str]:
    """What is wrong with texts and pictures in order: a picture follows the text that says its number."""
    misses, number = [], None
    for part in parts:
        if isinstance(part, str):
            said = re.findall(r"number (\d+)\.", part)
            number = int(said[-1]) if said else number
        elif number is None or not cases[number].same(part):
            misses.append(f"{where}: the picture beside text {number} is another one (it shows {number_in(part)})")
    return misses


def text(case: Case) -> str:
    return f"This is number {case.number}."


def in_documents(folder: Path, cases: list[Case]) -> tuple[int, list[str], int]:
    """Markdown and JSON lines, pictures as files and as data URIs: a document is whole or refused by name."""
    from dreamllm_edu.documents.formats import document_from_markdown, read_jsonl

    table, misses, refused, lines = {case.number: case for case in cases}, [], 0, []
    for case in cases:
        (folder / case.name).write_bytes(case.data)
    for i, group in enumerate(groups(cases)):
        inline = i % 2 and all(len(case.data) < 2**20 for case in group)
        source = lambda case, inline=inline: (
            f"data:image/png;base64,{base64.b64encode(case.data).decode()}" if inline else case.name
        )
        whole = all(case.picture for case in group)
        try:
            document = document_from_markdown("".join(f"{text(c)}![]({source(c)})" for c in group), folder, f"page {i}")
            misses += [] if whole else [f"Markdown {i}: a damaged picture is gone without a word"]
            misses += judged(document.parts, table, f"Markdown {i}")
            misses += (
                [] if len(document.pictures) == len(group) else [f"Markdown {i}: {len(document.pictures)} pictures"]
            )
        except ValueError:
            refused += 1
            misses += [f"Markdown {i}: refused, though each picture can be read"] if whole else []
        except Exception as error:
            misses.append(f"Markdown {i}: {type(error).__name__}: {error}")
        parts = [part for c in group for part in ({"text": text(c)}, {"picture": source(c)})]
        lines.append((json.dumps({"parts": parts}), whole))
    (folder / "a.jsonl").write_text("".join(line + "\n" for line, _ in lines))
    report: list[str] = []
    documents = read_jsonl(folder / "a.jsonl", strict=False, report=report)
    wholes = [number for number, (_, whole) in enumerate(lines) if whole]
    misses += [] if len(documents) == len(wholes) else [f"JSON lines: {len(documents)} documents, not {len(wholes)}"]
    bad = [number for number, (_, whole) in enumerate(lines, 1) if not whole]
    named = [int(re.search(r"a\.jsonl:(\d+)", message)[1]) for message in report]
    misses += [] if named == bad else ["JSON lines: other lines are refused than those with damaged pictures"]
    for number, document in zip(wholes, documents):
        misses += judged(document.parts, table, f"JSON line {number + 1}")
        misses += (
            [] if len(document.pictures) == 3 or number == len(lines) - 1 else [f"JSON line {number + 1}: lost one"]
        )
    return 2 * len(cases), misses, refused + len(report)


def corpora(folder: Path, cases: list[Case]) -> list:
    """The same pictures as they are published: LLaVA, MMC4 with a tar, LAION tars, OBELICS."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from dreamllm_edu.data.readers import laion, llava, mmc4, obelics

    def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))

    talks, pages, texts, urls, stored = [], [], [], [], []
    for group in groups(cases):
        question = "".join(f"{text(c)} <image>" for c in group)
        talks.append(
            {
                "image": [c.name for c in group],
                "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "yes"}],
            }
        )
        pages.append(
            {
                "text_list": [text(c) for c in group],
                "image_info": [{"image_name": c.name, "matched_text_index": k} for k, c in enumerate(group)],
            }
        )
        texts.append([t for c in group for t in (text(c), None)])
        urls.append([u for c in group for u in (None, f"https://example.org/{c.name}")])
        stored.append([b for c in group for b in (None, c.data)])
    (folder / "talks.json").write_text(json.dumps(talks))
    (folder / "pages.jsonl").write_text("".join(json.dumps(page) + "\n" for page in pages))
    with tarfile.open(folder / "pages.tar", "w") as tar:
        for case in cases:
            add(tar, f"images/{case.name}", case.data)
    with tarfile.open(folder / "pairs.tar", "w") as tar:
        for case in cases:
            add(tar, f"{case.number:05}.{case.ending}", case.data)
            add(tar, f"{case.number:05}.txt", text(case).encode())
    pq.write_table(pa.table({"texts": texts, "images": urls, "images_bytes": stored}), folder / "pages.parquet")
    return [
        llava("LLaVA", folder / "talks.json", folder),
        mmc4("MMC4", folder / "pages.jsonl", folder / "pages.tar", place="after"),
        laion("LAION", folder / "pairs.tar", task="draw"),
        obelics("OBELICS", folder / "pages.parquet"),
    ]


def in_corpora(corpora_: list, cases: list[Case]) -> tuple[int, list[str], int]:
    """Records of every corpus, opened: whole with their own pictures, or refused."""
    table, misses, refused = {case.number: case for case in cases}, [], 0
    for corpus in corpora_:
        read = 0
        for shard in corpus.shards:
            for i, record in enumerate(corpus.read(shard)):
                where = f"{corpus.name} record {i}"
                group = [cases[i]] if corpus.name == "LAION" else cases[3 * i : 3 * i + 3]
                whole = all(case.picture for case in group)
                try:
                    if isinstance(record, ValueError):
                        raise record
                    document = record.document()
                except ValueError:
                    refused += 1
                    misses += [f"{where}: refused, though each picture can be read"] if whole else []
                    continue
                except Exception as error:
                    misses.append(f"{where}: {type(error).__name__}: {error}")
                    continue
                read += 1
                misses += judged(document.parts, table, where)
                if not whole or len(document.pictures) != len(group):
                    misses.append(f"{where}: {len(document.pictures)} pictures of {len(group)}, whole={whole}")
        misses += [] if read else [f"{corpus.name}: nothing was read"]
    return len(corpora_) * len(cases), misses, refused


def in_training(folder: Path, corpora_: list, cases: list[Case], steps: int) -> tuple[int, list[str], int]:
    """The training's own stream, without and with stored features: the pixels or features of each document are those of
    the pictures that its text names."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from dreamllm_edu.models.dreamllm import DreamLLMProcessor
    from dreamllm_edu.models.dreamllm.family import DreamLLMFamily
    from dreamllm_edu.parts.tokenizer import train_tokenizer
    from dreamllm_edu.training.batches import Steps, step_stream
    from dreamllm_edu.training.features import FeatureStore, fill_store
    from dreamllm_edu.training.recipe import recipe_of
    from dreamllm_edu.training.stage import Settings

    from conftest import PATCHES, QUERIES, make_tiny

    images = CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    tokenizer = train_tokenizer(["This is number 12. User: Assistant: yes"] * 4, 300)
    family = DreamLLMFamily(make_tiny(), DreamLLMProcessor(images, tokenizer, QUERIES, PATCHES, max_length=256))
    stage = replace_stage(recipe_of("mini").stages[1])
    settings, table = Settings(lanes=4, mixing="document", max_length=256), {case.number: case for case in cases}
    store = FeatureStore(folder / "store", "x", dtype=torch.float32)
    fill_store(store, family, corpora_[:2], read_last=True)  # half of the corpora: some documents are stored, some not
    tried, misses, expected = 0, [], {}

    def own(role: str, number: int) -> dict[str, torch.Tensor]:
        """Pixels and features of a picture, computed alone."""
        if (role, number) not in expected:
            encoder = family.encoders[role]
            pixels = encoder.pixels([table[number].picture])
            with torch.no_grad():
                expected[role, number] = {"pixels": pixels[0], "stored": encoder.encode(pixels)[0]}
        return expected[role, number]

    skipped = 0
    for kept in (None, store):
        stream = step_stream(Steps(family, family.objective(stage), stage, corpora_, settings, store=kept))
        for _ in range(steps):
            items, states = next(stream)
            skipped = sum(lane["skipped"] for lane in states.values())
            for item in items:
                words = [int(n) for n in re.findall(r"number (\d+)\.", family.processor.decode(item.row.input_ids))]
                for role in ("images", "targets"):
                    for name in ("pixels", "stored"):
                        tensors = getattr(item, name).get(role, ())
                        if len(tensors) and len(tensors) != len(words):
                            misses.append(f"{item.name}: {len(tensors)} {role} for {len(words)} texts")
                        for number, tensor in zip(words, tensors):
                            tried += 1
                            same = table[number].picture is not None and torch.allclose(
                                tensor.float(), own(role, number)[name].float(), atol=1e-5
                            )
                            misses += [] if same else [f"{item.name}: {name} of {role} beside text {number} are others"]
    return tried, misses, skipped


def replace_stage(stage):
    from dataclasses import replace

    return replace(stage, batch=32, read_last=True, mixture={})


def run(folder: Path, quick: bool, seed: int) -> list[dict]:
    torch.set_num_threads(1)
    dice, n = random.Random(seed), 90 if quick else 1500
    cases = [Case(i, dice, sound=i % 3 == 1) for i in range(n)]
    damaged = [case for case in cases if case.number % 3 != 1]
    slowest = max(cases, key=lambda case: case.seconds)
    read = sum(case.picture is not None for case in damaged)
    rows = [
        row(
            "damaged and odd pictures, each read or refused with a reason",
            len(damaged),
            [case.miss for case in damaged if case.miss],
            f"{len(KINDS)} kinds; {read} read, {len(damaged) - read} refused, the slowest in {slowest.seconds:.1f} s",
        )
    ]
    tried, misses, refused = in_documents(folder, cases)
    rows.append(
        row(
            "the same in Markdown and JSON lines: no picture beside another's text",
            tried,
            misses,
            f"{refused} documents refused",
        )
    )
    made = corpora(folder, cases)
    tried, misses, refused = in_corpora(made, cases)
    rows.append(
        row(
            "the same in LLaVA, MMC4, LAION and OBELICS: no picture beside another's text",
            tried,
            misses,
            f"{refused} records refused",
        )
    )
    tried, misses, skipped = in_training(folder, made, cases, 3 if quick else 20)
    rows.append(
        row(
            "the same in a training's batches, opened or from stored features",
            tried,
            misses,
            f"{skipped} documents skipped",
        )
    )
    return rows
