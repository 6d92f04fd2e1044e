"""Bad input gets a clear error and loses nothing."""
import base64
import io
import json
import pickle
import random
import re
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, HeunDiscreteScheduler
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel, CLIPConfig, CLIPModel

from dreamllm_edu.documents.document import Document, Dream
from dreamllm_edu.documents.formats import document_from_json, document_from_markdown, read_jsonl, write_jsonl
from dreamllm_edu.documents.pictures import MAX_PIXELS, load_picture
from dreamllm_edu.evaluation.judge import Judge, load_judge
from dreamllm_edu.models.dreamllm.layout import SlotLayout
from dreamllm_edu.models.dreamllm.model import DreamLLM
from dreamllm_edu.models.dreamllm.weights import assemble, load_trained, save_trained
from dreamllm_edu.parts.diffusion import sample_latents, scheduler_config
from dreamllm_edu.parts.tokenizer import SPECIAL_TOKENS, encode_text
from dreamllm_edu.parts.vision import clip_config
from dreamllm_edu.training.checkpoint import last_checkpoint, load_checkpoint, save_checkpoint
from dreamllm_edu.training.report import read_log
from dreamllm_edu.training.strategies import Strategy
from dreamllm_edu.training.trainer import train_part

from conftest import CONTEXT, PATCHES, QUERIES, ROOT, full_disk, make_tiny, picture


def saved(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width, height, pixels=b""):
    """A PNG written by hand: its header may say anything."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(pixels))
        + chunk(b"IEND", b"")
    )


def tiff16(values, order):
    """A one-row 16-bit grey TIFF written by hand; `order`: `<` little-endian or `>` big-endian."""
    data = struct.pack(f"{order}{len(values)}H", *values)
    tags = [
        (256, 3, len(values)),
        (257, 3, 1),
        (258, 3, 16),
        (259, 3, 1),
        (262, 3, 1),
        (273, 4, 8),
        (277, 3, 1),
        (278, 3, 1),
        (279, 4, len(data)),
    ]
    entries = b"".join(
        struct.pack(f"{order}HHI", tag, kind, 1)
        + (struct.pack(f"{order}HH", value, 0) if kind == 3 else struct.pack(f"{order}I", value))
        for tag, kind, value in tags
    )
    return (
        (b"II" if order == "<" else b"MM")
        + struct.pack(f"{order}HI", 42, 8 + len(data))
        + data
        + struct.pack(f"{order}H", len(tags))
        + entries
        + bytes(4)
    )


# ---------------------------------------------------------------- pictures: what can be read

def test_hand_written_png_is_read():
    assert load_picture(png(2, 1, b"\0" + bytes([255, 0, 0, 0, 0, 255]))).tobytes() == bytes([255, 0, 0, 0, 0, 255])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_common_formats_keep_size_and_colour(kind):
    flat = Image.new("RGB", (31, 17), (200, 30, 60))
    found = load_picture(saved(flat, kind))
    assert (found.mode, found.size) == ("RGB", (31, 17))
    assert np.abs(np.asarray(found, int) - np.asarray(flat, int)).max() <= 6, (
        "lossy formats may differ by a little, no more"
    )


def test_path_bytes_file_and_picture_are_the_same(tmp_path):
    data = saved(picture(1))
    (tmp_path / "a.png").write_bytes(data)
    found = [
        load_picture(tmp_path / "a.png"),
        load_picture(str(tmp_path / "a.png")),
        load_picture(data),
        load_picture(io.BytesIO(data)),
        load_picture(picture(1)),
    ]
    assert {f.tobytes() for f in found} == {picture(1).tobytes()}


@pytest.mark.parametrize(
    "make",
    [lambda v: saved(Image.fromarray(np.array([v], np.uint16))), lambda v: tiff16(v, "<"), lambda v: tiff16(v, ">")],
    ids=["png", "tiff-little", "tiff-big"],
)
def test_16_bit_is_scaled_to_8(make):
    values = [0, 65535, 32768, 257, 25700]
    found = np.asarray(load_picture(make(values)))[0]
    assert found.shape == (5, 3)
    assert np.abs(found - np.array([[v / 257] * 3 for v in values])).max() <= 1


@pytest.mark.parametrize(
    "make",
    [lambda v: saved(Image.fromarray(np.array([v], np.uint16))), lambda v: tiff16(v, "<"), lambda v: tiff16(v, ">")],
    ids=["png", "tiff-little", "tiff-big"],
)
def test_a_nearly_black_16_bit_picture_stays_nearly_black(make):
    assert np.asarray(load_picture(make([0, 200, 255]))).max() <= 1, "255 of 65535 is black, not white"


def test_palette():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    assert load_picture(saved(image)).tobytes() == bytes([10, 20, 30, 200, 100, 50])


def test_cmyk():
    found = np.asarray(load_picture(saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")), int)
    assert found[..., 0].min() > 230 and found[..., 1:].max() < 30, "no cyan, full magenta and yellow: red"


@pytest.mark.parametrize("mode,clear,half", [("LA", (0, 0), (0, 128)), ("RGBA", (255, 0, 0, 0), (0, 0, 0, 128))])
def test_transparency_is_laid_on_white(mode, clear, half):
    assert load_picture(saved(Image.new(mode, (3, 3), clear))).tobytes() == b"\xff" * 27
    assert np.abs(np.asarray(load_picture(saved(Image.new(mode, (3, 3), half))), int) - 127).max() <= 1


@pytest.mark.parametrize("mode,colour", [("P", 1), ("L", 7), ("RGB", (1, 2, 3)), ("1", 1)])
def test_a_transparent_colour_is_white(mode, colour):
    image = Image.new(mode, (2, 2), colour)
    if mode == "P":
        image.putpalette([0, 0, 0, 255, 0, 0])
    assert load_picture(saved(image, transparency=colour)).tobytes() == b"\xff" * 12


def test_a_transparent_value_of_sixteen_bits_is_white_and_no_other():
    grey = Image.fromarray(np.array([[200, 51400, 25700]], np.uint16))  # as bytes: 0 (transparent), 200 (opaque), 100
    assert np.asarray(load_picture(saved(grey, transparency=200)))[0, :, 0].tolist() == [255, 200, 100]


def test_float_pictures_of_either_range():
    for values in ([[0.0, 0.5, 1.0]], [[0.0, 127.5, 255.0]]):
        found = np.asarray(load_picture(saved(Image.fromarray(np.array(values, np.float32)), "TIFF")))[0, :, 0]
        assert found.tolist() == [0, 127, 255]


@pytest.mark.parametrize("wrap", [lambda data: data, lambda data: io.BytesIO(data)], ids=["bytes", "file"])
def test_postscript_is_refused_before_an_interpreter_starts(wrap, monkeypatch):
    from PIL import EpsImagePlugin

    started = []
    monkeypatch.setattr(
        EpsImagePlugin, "Ghostscript", lambda *_, **__: started.append(1) or Image.new("RGB", (9, 9)).im
    )
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", "gs")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    Image.open(io.BytesIO(eps)).load()
    assert started, "Pillow alone does start it"
    started.clear()
    with pytest.raises(ValueError, match="unknown format.*PNG, JPEG, WebP or GIF"):
        load_picture(wrap(eps))
    assert not started


def test_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (5, 5), colour) for colour in ("red", "lime", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        with Image.open(io.BytesIO(data)) as stored:
            assert stored.n_frames == 3, "the test's own file must be animated"
        assert load_picture(data).getpixel((2, 2)) == (255, 0, 0)


# ---------------------------------------------------------------- pictures: what cannot be read

def test_no_picture(tmp_path):
    (tmp_path / "a.png").write_text("no picture at all")
    with pytest.raises(ValueError, match=r"a\.png: not a readable picture.*PNG, JPEG"):
        load_picture(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"gone\.png: no such file"):
        load_picture(tmp_path / "gone.png")
    with pytest.raises(ValueError, match="not a readable picture"):
        load_picture(b"")
    with pytest.raises(ValueError, match="not a readable picture"):
        load_picture(tmp_path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated(kind, share, tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8))
    data = saved(noise, kind)
    (tmp_path / "half").write_bytes(data[:int(len(data) * share)])
    with pytest.raises(ValueError, match="half: not a readable picture"):
        load_picture(tmp_path / "half")


def test_zero_sized():
    for size in ((0, 0), (0, 5), (5, 0)):
        with pytest.raises(ValueError, match="no pixels"):
            load_picture(Image.new("RGB", size))
    with pytest.raises(ValueError):
        load_picture(png(0, 5))


@pytest.mark.parametrize("side", [7100, 12000, 20000])
def test_decompression_bomb(side):
    """Below Pillow's warning, between its warning and its error, beyond its error: always ours, before anything is
    decoded."""
    assert side * side > MAX_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=r"50,000,000.*scale it down"):
            load_picture(png(side, side))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "PPM", "AVIF", "DDS", "QOI"])
def test_damaged_bytes_are_a_named_value_error_or_a_picture(kind, capfd):
    """300 damaged files of each format: whatever the decoder throws, users get a ValueError that says which file."""
    if kind == "AVIF" and ".avif" not in Image.registered_extensions():
        pytest.skip("this Pillow has no AVIF")
    data, rng, refused = saved(picture(3, 24), kind), random.Random(0), 0
    for i in range(300):
        damaged = bytearray(data if i % 2 else data[:rng.randrange(1, len(data))])
        for _ in range(rng.randint(1, 8)):
            damaged[rng.randrange(min(len(damaged), 200 if i % 3 else len(damaged)))] = rng.randrange(256)
        try:
            found = load_picture(bytes(damaged))
            assert found.mode == "RGB" and 0 not in found.size
        except ValueError as error:
            assert str(error).startswith("bytes: "), f"{error!r} does not say which picture"
            refused += 1
    assert refused > 20


@pytest.mark.parametrize(
    "image,expected",
    [
        (Image.new("RGBA", (64, 64), (0, 0, 0, 0)), (255, 255, 255)),
        (Image.new("LA", (64, 64), (0, 0)), (255, 255, 255)),
        (Image.new("CMYK", (64, 64), (0, 255, 255, 0)), (255, 0, 0)),
        (Image.fromarray(np.full((64, 64), 25700, np.uint16)), (100, 100, 100)),
    ],
    ids=["RGBA", "LA", "CMYK", "16-bit"],
)
def test_a_document_holds_rgb_whatever_it_was_given(image, expected, processor):
    """As `Image.open` gives them: the model must see the same as after `load_picture`."""
    document = Document(["see: ", image])
    assert np.abs(np.asarray(document.pictures[0].convert("RGB"), int) - expected).max() <= 1
    assert torch.equal(processor.pixels(document.pictures), processor.pixels([load_picture(image)]))


def test_a_document_refuses_a_picture_that_cannot_be_used():
    with pytest.raises(ValueError, match="no pixels"):
        Document(["see: ", Image.new("RGB", (0, 3))])
    cut = Image.open(io.BytesIO(saved(Image.effect_noise((60, 60), 90).convert("RGB"), "JPEG")[:-900]))
    with pytest.raises(ValueError, match="page 7.*not a readable picture"):
        Document(["see: ", cut], name="page 7")


# ---------------------------------------------------------------- documents

def test_empty_documents(processor, tiny):
    with pytest.raises(ValueError, match="page 3.*empty"):
        processor(Document([], name="page 3"))
    with pytest.raises(ValueError, match="empty"):
        processor([Document(["fine"]), Document([])])
    with pytest.raises(ValueError, match="page 3.*empty"):
        tiny.generate(Document([], name="page 3"), processor)
    with pytest.raises(ValueError, match="batch"):
        processor([])
    assert tiny.generate([], processor) == []


@pytest.mark.parametrize(
    "part,kind",
    [
        (None, "NoneType"),
        (5, "int"),
        (b"text", "bytes"),
        (["a"], "list"),
        (np.zeros((4, 4, 3)), "ndarray"),
        ({"text": "a"}, "dict"),
        (Dream, "type"),
    ],
)
def test_wrong_part_types(part, kind):
    with pytest.raises(ValueError, match=rf"page 3: part 1 is a {kind}; a document holds str, PIL.Image and Dream"):
        Document(["text", part], name="page 3")


def test_given_counts_parts():
    for given in (-1, 3):
        with pytest.raises(ValueError, match=f"given={given}.*2 parts"):
            Document(["a", "b"], given)


def test_text_that_is_no_unicode_is_refused_by_name():
    with pytest.raises(ValueError, match="page 3"):
        Document(["a lone surrogate \ud800"], name="page 3")
    with pytest.raises(ValueError, match="corpus:7"):
        document_from_json('{"parts": [{"text": "\\ud800"}]}', "corpus:7")


def test_a_dream_is_no_training_target(processor):
    with pytest.raises(ValueError, match=r"Dream\(\).*generate"):
        processor(Document(["draw", Dream()]))


NO_DOCUMENTS = {
    "not json": "{'parts': []}",
    "cut": '{"parts": [{"text": "a"',
    "no object": "[1, 2]",
    "null": "null",
    "no parts": "{}",
    "parts no list": '{"parts": "text"}',
    "part no object": '{"parts": ["a"]}',
    "two kinds": '{"parts": [{"text": "a", "dream": true}]}',
    "text no string": '{"parts": [{"text": 5}]}',
    "dream denied": '{"parts": [{"dream": false}]}',
    "given no number": '{"parts": [{"text": "a"}], "given": "1"}',
    "given truth value": '{"parts": [{"text": "a"}], "given": true}',
    "given too large": '{"parts": [], "given": 1}',
    "huge number": '{"parts": [], "given": ' + "1" * 5000 + "}",
    "nested": "[" * 100_000,
    "web address": '{"parts": [{"picture": "https://example.org/a.png"}]}',
    "no such file": '{"parts": [{"picture": "gone.png"}]}',
    "no base64": '{"parts": [{"picture": "data:image/png;base64,?"}]}',
    "no picture": '{"parts": [{"picture": "data:image/png;base64,AAAA"}]}',
    "lone surrogate": '{"parts": [{"text": "\\ud800"}]}',
}


@pytest.mark.parametrize("line", NO_DOCUMENTS.values(), ids=NO_DOCUMENTS.keys())
def test_a_line_that_is_no_document_names_file_and_line(line, tmp_path):
    path = tmp_path / "corpus.jsonl"
    good = Document(["good"]).to_json()
    path.write_text(f"{good}\n\n{line}\n{good}\n", encoding="utf8")
    with pytest.raises(ValueError, match=r"corpus\.jsonl:3: "):
        read_jsonl(path)
    report = []
    assert read_jsonl(path, strict=False, report=report) == [Document(["good"])] * 2
    assert len(report) == 1 and "corpus.jsonl:3: " in report[0]


def test_many_bad_lines_are_skipped_and_counted(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_bytes("\n".join([*NO_DOCUMENTS.values(), Document(["a"]).to_json()]).encode() + b"\n\xff\xfe no utf8\n")
    report = []
    assert read_jsonl(path, strict=False, report=report) == [Document(["a"])]
    assert len(report) == len(NO_DOCUMENTS) + 1
    assert [int(re.search(r"jsonl:(\d+): ", line)[1]) for line in report] == [
        *range(1, len(NO_DOCUMENTS) + 1),
        len(NO_DOCUMENTS) + 2,
    ]


def test_web_addresses_are_refused():
    for address in (
        "http://example.org/a.png",
        "https://example.org/a.png",
        "ftp://example.org/a.png",
        "file:///etc/a.png",
        "HTTPS://example.org/a.png",
    ):
        with pytest.raises(ValueError, match="not fetched"):
            document_from_markdown(f"see ![a]({address})")


HOSTILE = [
    "<dream>",
    "![x](y)",
    "![](https://example.org/a.png)",
    "a\\",
    "a\\\\",
    "\\!",
    "\\<dream>",
    "!",
    "!!",
    "<",
    "\\",
    "<b>bold</b>",
    "<script>alert(1)</script>",
    "line\nline\n\n# title",
    "tab\tand\u2028odd\x85breaks\r\n",
    "&amp; &lt;",
    "<dream_start>",
    "[x](y)",
    "!\\[x](y)",
    "<dream",
    ">",
    "![x",
    "](y)",
    "`code`",
    "日本語 é 🐱",
    " ",
    "\x00",
]


@pytest.mark.parametrize("text", HOSTILE, ids=repr)
def test_hostile_text_round_trips(text, tmp_path):
    one, two = picture(1, 8), picture(2, 8)
    for document in (
        Document([text]),
        Document([one, text, two]),
        Document([text, one]),
        Document([text, Dream(), text]),
        Document([one, Dream(), text, one, two, text, Dream()]),
    ):
        assert document_from_markdown(document.to_markdown()).parts == document.parts
        assert document_from_markdown(document.to_markdown(tmp_path), tmp_path).parts == document.parts
        assert document_from_json(document.to_json()) == document
        write_jsonl([document, document], tmp_path / "a.jsonl")
        assert read_jsonl(tmp_path / "a.jsonl") == [document, document]


def test_random_hostile_text_round_trips_through_markdown():
    rng, pieces = (
        random.Random(0),
        ["\\", "!", "[", "]", "(", ")", "<", ">", "dream", "x", "\n", " ", "<dream>", "![a](b)"],
    )
    for _ in range(2000):
        parts = []
        for kind in rng.choices("tpd", k=rng.randint(1, 4)):
            text = "".join(rng.choices(pieces, k=rng.randint(1, 6)))
            parts += (
                [text]
                if kind == "t" and not (parts and isinstance(parts[-1], str))
                else [Dream()]
                if kind == "d"
                else [picture(1, 2)]
            )
        assert document_from_markdown(Document(parts).to_markdown()).parts == parts


def test_equality_is_of_content_not_of_objects():
    assert Document(["a", picture(1)]) == Document(["a", picture(1)]) != Document(["a", picture(2)])
    assert Document(["a"], 1) != Document(["a"], 0) and Document(["<dream>"]) != Document([Dream()])


def test_html_escapes_text():
    attack = '<img src=x onerror="alert(1)">&</span><script>alert(2)</script>\'"'
    for page in (Document([attack, picture(1, 8)]).to_html(), Document([attack]).to_slides(attack)):
        assert "<script" not in page and "onerror=\"" not in page.replace("&quot;", "") and "<img src=x" not in page
        assert "&lt;script&gt;alert(2)&lt;/script&gt;" in page and "&amp;" in page
    alt = re.search(r'alt="([^"]*)"', Document([attack, picture(1, 8)]).to_html())[1]
    assert "<" not in alt and ">" not in alt
    assert "&lt;dream&gt;" in Document([Dream()]).to_html()


def test_pictures_in_html_are_the_pictures():
    found = re.search(r"base64,([^\"]+)", Document([picture(4)]).to_html())[1]
    assert Image.open(io.BytesIO(base64.b64decode(found))).tobytes() == picture(4).tobytes()


# ---------------------------------------------------------------- tokens

def test_typed_special_tokens_stay_text(tokenizer, processor):
    special = set(range(len(SPECIAL_TOKENS)))
    assert [tokenizer.convert_tokens_to_ids(t) for t in SPECIAL_TOKENS] == sorted(special)
    for token in (*SPECIAL_TOKENS, "<dream>", "".join(SPECIAL_TOKENS), "<s>" * 3, " <pad> ", "x<image_start>y</s>"):
        ids = encode_text(tokenizer, token)
        assert ids and not special & set(ids), f"{token} typed by a user became a special token"
        assert tokenizer.decode(ids) == token, "and it must not be lost either"
        row = processor(Document([token]))["input_ids"][0].tolist()
        assert row[0] == 1 and row[-1] == 2 and not special & set(row[1:-1])


@pytest.mark.parametrize("token", SPECIAL_TOKENS)
def test_special_tokens_are_not_made_across_parts(token, processor):
    for cut in range(1, len(token)):
        row = processor(Document([token[:cut], token[cut:]]))["input_ids"][0].tolist()
        assert all(i >= len(SPECIAL_TOKENS) for i in row[1:-1])
        row = processor(Document([token[:cut], picture(1), token[cut:]], given=2))["input_ids"][0].tolist()
        assert sum(i < len(SPECIAL_TOKENS) for i in row) == 2 + PATCHES + 2


def test_typed_special_tokens_do_not_steer_generation(trained, processor):
    document = trained.generate(
        Document(["<dream_start><dream_query><image_start>"]), processor, max_new_tokens=2, max_pictures=0
    )
    assert document.parts[0] == "<dream_start><dream_query><image_start>" and not document.pictures


@pytest.mark.parametrize("lost", SPECIAL_TOKENS)
def test_a_tokenizer_without_a_special_token_is_an_error(lost, tokenizer):
    class Lacking:
        unk_token_id = 17

        def convert_tokens_to_ids(self, token):
            return {True: self.unk_token_id, False: tokenizer.convert_tokens_to_ids(token)}[token == lost]

    with pytest.raises(ValueError, match=f"lacks the special tokens.*{lost}"):
        SlotLayout(Lacking(), QUERIES, PATCHES, CONTEXT)


def test_a_foreign_tokenizer_without_unknown_token_is_an_error():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    with pytest.raises(ValueError, match="lacks the special tokens"):
        SlotLayout(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())), QUERIES, PATCHES, CONTEXT)


def blocks_are_whole(row, queries, patches):
    """Independent grammar check of one row of token ids, by regular expression over one letter a token."""
    letters = "".join({0: "_", 1: "^", 2: "$", 3: "D", 4: "q", 5: "d", 6: "I", 7: "p", 8: "i"}.get(i, "t") for i in row)
    return re.fullmatch(rf"\^(t|(Dq{{{queries}}}d)?Ip{{{patches}}}i)*\$?", letters)


def random_parts(rng):
    words = ["a red cat ", "x", "one two three ", "\n", "é"]
    return [
        rng.choice(words) * rng.randint(1, 6) if rng.random() < 0.6 else picture(rng.randint(0, 3), 64)
        for _ in range(rng.randint(1, 6))
    ]


def test_truncation_never_cuts_a_block(tokenizer):
    rng = random.Random(0)
    layout = SlotLayout(tokenizer, 3, 4, 10_000)
    for _ in range(60):
        parts = random_parts(rng)
        given = rng.randint(0, len(parts))
        whole = layout.encode(parts, given)
        assert not whole.truncated and blocks_are_whole(whole.input_ids, 3, 4)
        for length in range(2, len(whole.input_ids) + 2):
            short = SlotLayout(tokenizer, 3, 4, length)
            cut = short.encode(parts, given)
            n = len(cut.input_ids)
            assert n <= length and n == len(cut.labels)
            assert blocks_are_whole(cut.input_ids, 3, 4), f"a block is cut at {length} of {len(whole.input_ids)} tokens"
            assert cut.truncated == (length < len(whole.input_ids))
            keep = n if cut.truncated else n - 1
            assert cut.input_ids[:keep] == whole.input_ids[:keep] and cut.labels[:keep] == whole.labels[:keep], (
                "what is kept is a prefix"
            )
            assert len(cut.images) == cut.input_ids.count(6) and len(cut.targets) == cut.input_ids.count(3), (
                "pictures and blocks go together"
            )
            if cut.truncated:
                with pytest.raises(ValueError, match="context holds"):
                    short.encode(parts, given, truncate=False)


def test_labels_rule(processor, tokenizer):
    """Text and <dream_start> of what is not given learn, and </s>; slots, end markers and everything given do not."""
    words = {text: tokenizer.encode(text, add_special_tokens=False) for text in ("a red cat", " blue dog")}
    batch = processor(Document(["a red cat", picture(1), " blue dog", picture(2)], given=2))
    prompt, middle, answer = words["a red cat"], [6] + [7] * PATCHES + [8], words[" blue dog"]
    drawn = [3] + [4] * QUERIES + [5] + [6] + [7] * PATCHES + [8]
    assert batch["input_ids"][0].tolist() == [1] + prompt + middle + answer + drawn + [2]
    assert batch["labels"][0].tolist() == [-100] * (1 + len(prompt) + len(middle)) + answer + [3] + [-100] * (
        len(drawn) - 1
    ) + [2]
    assert len(batch["pixel_values"]) == 2 and len(batch["target_pixel_values"]) == 1
    nothing = processor(Document(["a red cat", picture(1)], given=2))
    assert (nothing["labels"] == -100).all(), "a document that is all given teaches nothing"


def test_padding_is_masked_and_not_learned(processor):
    batch = processor([Document(["a"]), Document(["a much longer text than the other"])])
    short = int(batch["attention_mask"][0].sum())
    assert short < batch["input_ids"].shape[1]
    assert (
        (batch["input_ids"][0, short:] == 0).all()
        and (batch["labels"][0, short:] == -100).all()
        and not batch["attention_mask"][0, short:].any()
    )


def test_target_pixels_are_the_picture(processor):
    value = processor(Document([picture(5)]))["target_pixel_values"][0]
    assert torch.allclose(value, torch.tensor(np.asarray(picture(5))).permute(2, 0, 1) / 127.5 - 1, atol=1e-6)


# ---------------------------------------------------------------- more than fits, and mismatches

def test_more_pictures_than_the_context_holds(processor, tiny):
    many = [picture(i % 3) for i in range(1 + CONTEXT // (PATCHES + 2))]
    with pytest.raises(ValueError, match=f"album.*part .*context holds {CONTEXT}"):
        processor(Document(many, len(many), "album"), truncate=False)
    with pytest.raises(ValueError, match=f"album.*context holds {CONTEXT}"):
        tiny.generate(Document(many, name="album"), processor)
    kept = processor(Document(many, len(many)))
    assert 0 < len(kept["pixel_values"]) < len(many) and kept["input_ids"].shape[1] <= CONTEXT


def test_more_wishes_than_the_context_holds_is_said_before_drawing(processor, tiny, monkeypatch):
    """Nobody should wait for ten pictures to be told that the eleventh does not fit."""
    drawn = []
    monkeypatch.setattr(
        type(tiny.unet),
        "forward",
        lambda self, *a, **k: (
            drawn.append(1) or (_ for _ in ()).throw(AssertionError("drew a picture before the error"))
        ),
    )
    fits = (CONTEXT - 1 + PATCHES + 2) // (QUERIES + 2 + PATCHES + 2)  # nobody looks at the last one
    with pytest.raises(ValueError, match=f"album.*context holds {CONTEXT}"):
        tiny.generate(
            [Document(["one"]), Document([Dream()] * (fits + 1), name="album")],
            processor,
            max_new_tokens=0,
            num_inference_steps=1,
        )
    assert not drawn


def test_as_many_wishes_as_fit_are_drawn(processor, tiny):
    fits = (CONTEXT - 1 + PATCHES + 2) // (QUERIES + 2 + PATCHES + 2)
    document = tiny.generate(Document([Dream()] * fits), processor, max_new_tokens=0, num_inference_steps=1)
    assert len(document.pictures) == fits


def test_generation_stays_inside_the_context(trained, processor):
    """A prompt that nearly fills the context: the model ends in time instead of failing."""
    for room in (0, 1, 2, 5, QUERIES + PATCHES + 4, QUERIES + PATCHES + 6):
        text = "x"
        while len(processor.tokenizer.encode(text + "x", add_special_tokens=False)) + 1 <= CONTEXT - room:
            text += "x"
        document = trained.generate(Document([text]), processor, max_new_tokens=40, num_inference_steps=1)
        assert document.parts[0] == text


def test_pictures_and_slots_must_match(processor, tiny):
    batch = processor([Document(["a", picture(1), "b", picture(2)], 2)])
    fine = tiny(**batch)
    assert torch.isfinite(fine.loss)
    with pytest.raises(ValueError, match="2 image blocks.*1 pictures"):
        tiny(**{**batch, "pixel_values": batch["pixel_values"][:1]})
    with pytest.raises(ValueError, match="2 image blocks.*3 pictures"):
        tiny(**{**batch, "pixel_values": batch["pixel_values"][[0, 1, 1]]})
    with pytest.raises(ValueError, match="2 image blocks.*0 pictures"):
        tiny(**{k: v for k, v in batch.items() if k != "pixel_values"})
    with pytest.raises(ValueError, match="1 dream blocks.*2 target"):
        tiny(**{**batch, "target_pixel_values": batch["target_pixel_values"][[0, 0]]})
    text = processor(Document(["only words"]))
    with pytest.raises(ValueError, match="0 image blocks.*1 pictures"):
        tiny(**text, pixel_values=batch["pixel_values"][:1])
    with pytest.raises(ValueError, match="0 dream blocks.*1 target"):
        tiny(**text, target_pixel_values=batch["target_pixel_values"])


def test_a_cut_block_is_an_error(processor, tiny):
    batch = processor(Document(["a", picture(1)]))
    for keep in range(batch["input_ids"].shape[1] - PATCHES, batch["input_ids"].shape[1] - 3):
        with pytest.raises(ValueError, match="cut"):
            tiny(input_ids=batch["input_ids"][:, :keep], pixel_values=batch["pixel_values"])


def test_a_processor_for_another_model_is_an_error(processor, tiny):
    import copy
    for name in ("num_queries", "num_patches"):
        other = copy.copy(processor)
        setattr(other, name, getattr(processor, name) + 1)
        with pytest.raises(ValueError, match="quer|patch|slots"):
            tiny.generate(Document(["a", picture(1), Dream(), "b"]), other, max_new_tokens=1, num_inference_steps=1)


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": -1},
        {"max_pictures": -1},
        {"temperature": -0.1},
        {"top_p": 0},
        {"top_p": 1.5},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": float("nan")},
        {"num_inference_steps": 0},
        {"guidance_scale": -1},
        {"guidance_scale": float("nan")},
        {"num_inference_steps": 1001},
    ],
    ids=str,
)
def test_generation_options_out_of_range(options, processor, tiny):
    with pytest.raises(ValueError):
        tiny.generate(Document(["a", Dream()]), processor, **{"max_new_tokens": 2, "num_inference_steps": 1, **options})


@pytest.mark.parametrize("strength", [0, -0.5, 1.5, float("nan")])
def test_a_walk_cannot_begin_before_its_beginning(strength, tiny):
    words = torch.zeros(1, 2, tiny.unet.config.cross_attention_dim)
    with pytest.raises(ValueError, match="share of the walk"):
        sample_latents(tiny.unet, tiny.scheduler, words, words, latents=torch.zeros(1, 8, 8, 8), strength=strength)
    with pytest.raises(ValueError, match="given latents"):
        sample_latents(tiny.unet, tiny.scheduler, words, words, strength=0.5)


@pytest.mark.parametrize(
    "sampler, message",
    [
        (lambda c: DDIMScheduler(), "other noise levels"),
        (lambda c: DDIMScheduler.from_config(c, num_train_timesteps=500), "other noise levels"),
        (lambda c: FlowMatchEulerDiscreteScheduler(), "other noise levels"),
        (lambda c: HeunDiscreteScheduler.from_config(c), "rescale_betas_zero_snr"),
        (lambda c: DDIMScheduler.from_config(c, prediction_type="epsilon"), "takes answers for epsilon"),
    ],
)
def test_a_sampler_of_another_world_is_refused(sampler, message, tiny):
    scheduler, words = DDPMScheduler(**scheduler_config()), torch.zeros(1, 2, tiny.unet.config.cross_attention_dim)
    with pytest.raises(ValueError, match=message):
        sample_latents(tiny.unet, scheduler, words, words, sampler=sampler(scheduler.config))


def test_no_new_tokens_draws_the_wishes_and_nothing_else(trained, processor):
    """After `dog:` the trained model's first choice is a picture of its own."""
    assert trained.generate(Document(["dog:"]), processor, max_new_tokens=5, num_inference_steps=1).pictures
    assert trained.generate(Document(["dog:"]), processor, max_new_tokens=0, num_inference_steps=1).parts == ["dog:"]
    document = trained.generate(Document(["x", Dream(), "dog:"]), processor, max_new_tokens=0, num_inference_steps=1)
    assert [type(p) is str for p in document.parts] == [True, False, True]


# ---------------------------------------------------------------- checkpoints

def fingerprint(path):
    path = Path(path)
    return (
        {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}
        if path.is_dir()
        else path.read_bytes()
    )


def test_save_and_load_round_trip(tmp_path):
    model = make_tiny(7)
    model.save_pretrained(tmp_path / "a")
    for again in (DreamLLM.from_pretrained(tmp_path / "a"), AutoModel.from_pretrained(tmp_path / "a")):
        assert type(again) is DreamLLM and not again.training
        assert again.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
        plain = lambda config: {
            k: v
            for k, v in json.loads(config.to_json_string()).items()
            if k not in ("dtype", "architectures", "text_config", "vision_config")
        }
        assert (
            plain(again.config) == plain(model.config)
            and again.config.text_config.hidden_size == model.config.text_config.hidden_size
        )
        assert all(
            not p.requires_grad for part in ("unet", "vae", "vision_encoder") for p in getattr(again, part).parameters()
        )
    assert {p.suffix for p in (tmp_path / "a").iterdir()} == {".json", ".safetensors"}


def test_a_reloaded_model_says_the_same(tmp_path, processor):
    model = make_tiny(7)
    model.save_pretrained(tmp_path / "a")
    again, batch = DreamLLM.from_pretrained(tmp_path / "a"), processor(Document(["a", picture(1)]))
    draws = {"vae_noise": torch.zeros(1, 4, 8, 8), "noise": torch.ones(1, 4, 8, 8), "timesteps": torch.tensor([500])}
    assert torch.equal(model(**batch, **draws).loss, again(**batch, **draws).loss)


def test_the_processor_round_trips(tmp_path, processor):
    from dreamllm_edu.models.dreamllm.processor import DreamLLMProcessor
    processor.save_pretrained(tmp_path / "p")
    again = DreamLLMProcessor.from_pretrained(tmp_path / "p")
    assert (again.num_queries, again.num_patches, again.target_size, again.max_length) == (
        QUERIES,
        PATCHES,
        64,
        CONTEXT,
    )
    one, two = processor(Document(["a <s>", picture(1)])), again(Document(["a <s>", picture(1)]))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("damage", ["missing", "extra", "reshaped", "renamed"])
def test_a_checkpoint_with_other_tensors(damage, tmp_path):
    model = make_tiny()
    model.save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / "model.safetensors"
    state = load_file(path)
    name = "dream_queries.weight"
    tensor = state.pop(name) if damage != "extra" else torch.zeros(2)
    if damage in ("extra", "renamed"):
        name = "dream_queries.other"
    if damage == "reshaped":
        tensor = torch.zeros(len(tensor) + 1, tensor.shape[1])
    if damage != "missing":
        state[name] = tensor
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"not a checkpoint of this model.*dream_queries"):
        DreamLLM.from_pretrained(tmp_path / "a")


@pytest.mark.parametrize("keep", [0, 4, 1000, -100])
def test_a_truncated_checkpoint(keep, tmp_path):
    make_tiny().save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="damaged or cut off"):
        DreamLLM.from_pretrained(tmp_path / "a")


def test_trained_weights_round_trip_in_half_precision(tmp_path):
    model, other = make_tiny(1), make_tiny(2)
    save_trained(model, tmp_path / "t.safetensors")
    frozen = {k: v.clone() for k, v in other.state_dict().items() if k.split(".")[0] in other.frozen_parts}
    load_trained(other, tmp_path / "t.safetensors")
    for name, value in other.state_dict().items():
        if name in frozen:
            assert torch.equal(value, frozen[name]), "frozen parts are not in this file"
        else:
            assert torch.equal(value, model.state_dict()[name].half().float())
    assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]


@pytest.mark.parametrize("damage", ["missing", "extra", "reshaped"])
def test_trained_weights_with_other_tensors(damage, tmp_path):
    path = tmp_path / "t.safetensors"
    save_trained(make_tiny(), path)
    state = load_file(path)
    if damage == "missing":
        state.pop("condition_projector.linear.weight")
    else:
        state["condition_projector.extra" if damage == "extra" else "condition_projector.linear.weight"] = torch.zeros(
            3
        )
    save_file(state, path)
    model = make_tiny(3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"t\.safetensors is not a checkpoint of this model: 1 tensors.*condition_projector"
    ):
        load_trained(model, path)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "a refused checkpoint changes nothing"


def test_trained_weights_missing_or_cut(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.safetensors: no such file"):
        load_trained(make_tiny(), tmp_path / "gone.safetensors")
    save_trained(make_tiny(), tmp_path / "t.safetensors")
    data = (tmp_path / "t.safetensors").read_bytes()
    for keep in (0, 7, 500, len(data) - 10):
        (tmp_path / "t.safetensors").write_bytes(data[:keep])
        with pytest.raises(ValueError, match="damaged or cut off"):
            load_trained(make_tiny(), tmp_path / "t.safetensors")


def parts_folder(model, folder):
    """The parts of a model as `pretrain` leaves them, in the libraries' own formats."""
    clip = CLIPModel(
        CLIPConfig(
            vision_config=model.config.vision_config.to_dict(),
            text_config=clip_config(vocab_size=300, hidden=32, layers=2, text_layers=1, heads=2).text_config.to_dict(),
            projection_dim=128,
        )
    )
    clip.vision_model.load_state_dict(model.vision_encoder.state_dict())
    for name, part in (
        ("language", model.language_model),
        ("clip", clip),
        ("unet", model.unet),
        ("vae", model.vae),
        ("scheduler", model.scheduler),
    ):
        part.save_pretrained(folder / name)


def test_a_model_is_assembled_from_parts(tmp_path):
    model = make_tiny(5)
    parts_folder(model, tmp_path)
    again = assemble(tmp_path / "language", tmp_path / "clip", tmp_path, num_queries=3)
    for name, value in again.state_dict().items():
        if name.split(".")[0] in (*model.frozen_parts, "language_model"):
            assert torch.equal(value, model.state_dict()[name]), name
    assert again.dream_queries.weight.shape[0] == 3 and again.scheduler.config.prediction_type == "v_prediction"


@pytest.mark.parametrize(
    "part,file",
    [("language", "model"), ("clip", "model"), ("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model")],
)
def test_a_damaged_part_is_an_error_and_never_random_weights(part, file, tmp_path):
    """An interrupted download, a file of another model: the libraries only warn about missing tensors and draw them at
    random."""
    parts_folder(make_tiny(5), tmp_path)
    path = tmp_path / part / f"{file}.safetensors"
    whole, build = load_file(path), lambda: assemble(tmp_path / "language", tmp_path / "clip", tmp_path)
    name = next(k for k in sorted(whole) if "norm" in k and not k.startswith("text_model"))
    for state in ({k: v for k, v in whole.items() if k != name}, {**whole, name: torch.zeros(3, 5)}):
        save_file(state, path, metadata={"format": "pt"})
        with pytest.raises(
            ValueError, match=part if name in state else rf"{part}.*missing.*{re.escape(name.split('.', 1)[1])}"
        ):
            build()
    save_file(whole, path, metadata={"format": "pt"})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises((ValueError, OSError), match=part):
        build()
    path.unlink()
    with pytest.raises((ValueError, OSError), match=part):
        build()


@pytest.mark.parametrize("damage", ["gone", "cut", "missing", "reshaped"])
def test_a_damaged_judge(damage, tmp_path):
    judge = Judge(7)
    state = judge.state_dict()
    if damage == "missing":
        state.pop("concept.bias")
    if damage == "reshaped":
        state["body.0.weight"] = torch.zeros(2)
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    if damage == "gone":
        path.unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        load_judge(tmp_path)


@pytest.mark.parametrize("alt", ["", "Fig. [1]", "a [b", "[a] [b] c"])
def test_brackets_in_the_words_beside_a_picture(alt, tmp_path):
    picture(1).save(tmp_path / "x.png")
    assert document_from_markdown(f"see ![{alt}](x.png) here", tmp_path).parts == ["see ", picture(1), " here"]


def test_a_name_too_long_for_a_disk_is_a_bad_picture():
    with pytest.raises(ValueError, match="too long"):
        document_from_markdown(f"![]({'a%20' * 300}.png)")


def test_a_model_on_another_device_is_told_where_to_train():
    with pytest.raises(ValueError, match=r"model\.to\('cpu'\).*dreamllm_edu\.train"):
        train_part(torch.nn.Linear(2, 2, device="meta"), lambda m, s, g: {}, 1, 1e-3, progress=False)


@pytest.mark.parametrize(
    "options,word",
    [
        ({"device_map": "cuda"}, "device_map"),
        ({"dtype": "bfloat"}, "dtype='bfloat'"),
        ({"revision": "main"}, "revision"),
    ],
)
def test_options_that_would_do_nothing_for_the_miniature_are_refused(options, word):
    with pytest.raises(ValueError, match=word):
        DreamLLM.from_pretrained("mini", **options)


def test_full_disk_leaves_the_old_checkpoint(tmp_path):
    old = make_tiny(1)
    old.save_pretrained(tmp_path / "a")
    before = fingerprint(tmp_path / "a")
    with full_disk(), pytest.raises(OSError, match="untouched"):
        make_tiny(2).save_pretrained(tmp_path / "a")
    assert fingerprint(tmp_path / "a") == before
    assert [p.name for p in tmp_path.iterdir()] == ["a"], "no rubbish stays on the full disk"
    again = DreamLLM.from_pretrained(tmp_path / "a")
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in old.state_dict().items())


def test_full_disk_leaves_the_old_trained_weights(tmp_path):
    save_trained(make_tiny(1), tmp_path / "t.safetensors")
    before = fingerprint(tmp_path / "t.safetensors")
    with full_disk(), pytest.raises(OSError, match="untouched"):
        save_trained(make_tiny(2), tmp_path / "t.safetensors")
    assert fingerprint(tmp_path / "t.safetensors") == before
    assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]


def shares_of(**tensors):
    return {f"model/{name}": Strategy().share(tensor) for name, tensor in tensors.items()}


@pytest.mark.parametrize("limit", [4096, 100], ids=["tensors", "manifest"])
def test_full_disk_leaves_the_old_training_checkpoint(limit, tmp_path):
    """Neither the tensors nor, where these are few, what is written last: the manifest."""
    n = 5000 if limit > 1000 else 1
    save_checkpoint(tmp_path, shares_of(w=torch.ones(n)), {"step": 1}, keep=1)
    before = fingerprint(tmp_path)
    with full_disk(limit), pytest.raises(OSError, match="untouched"):
        save_checkpoint(tmp_path, shares_of(w=torch.zeros(n)), {"step": 2}, keep=1)
    assert fingerprint(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"], "no rubbish stays on the full disk"


def test_a_disk_that_is_full_during_training_costs_no_step_before_the_last_checkpoint(tmp_path):
    layer = torch.nn.Linear(40, 40)
    begun = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    teach = lambda module, **more: train_part(
        module, lambda m, s, g: {"loss": m(torch.randn(4, 40, generator=g)).square().mean()}, 4, 1e-3,
        folder=tmp_path, warmup=1, precision="no", save_every=2, progress=False, **more,
    )

    def fill(step, trainer):
        if step == 2:
            raise MemoryError
    with pytest.raises(MemoryError):
        teach(layer, on_step=fill)
    before = fingerprint(tmp_path / "step-00000002")
    layer.load_state_dict(begun)
    with full_disk(), pytest.raises(OSError, match="could not save .*step-00000004.*untouched"):
        teach(layer)
    assert fingerprint(tmp_path / "step-00000002") == before and not list(tmp_path.glob(".step*"))
    assert last_checkpoint(tmp_path)[1]["step"] == 2
    layer.load_state_dict(begun)
    assert [row["step"] for row in teach(layer)[1]] == [0, 1, 2, 3]


def test_full_disk_leaves_the_old_documents(tmp_path):
    write_jsonl([Document(["old"])], tmp_path / "a.jsonl")
    with full_disk(), pytest.raises(OSError):
        write_jsonl([Document(["new", picture(i)]) for i in range(20)], tmp_path / "a.jsonl")
    assert read_jsonl(tmp_path / "a.jsonl") == [Document(["old"])]
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"], "no rubbish stays on the full disk"


def test_any_refused_write_leaves_the_old_files(tmp_path, monkeypatch):
    """The same, with the error put in by hand: it also covers systems whose full disk looks different."""
    import dreamllm_edu.files
    import dreamllm_edu.models.dreamllm.weights
    import dreamllm_edu.training.checkpoint

    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    make_tiny(1).save_pretrained(tmp_path / "a")
    save_checkpoint(tmp_path / "run", shares_of(w=torch.ones(3)), {"step": 1}, keep=1)
    save_trained(make_tiny(1), tmp_path / "t.safetensors")
    before = fingerprint(tmp_path)
    monkeypatch.setattr(dreamllm_edu.training.checkpoint, "save_file", refuse)
    monkeypatch.setattr(dreamllm_edu.files, "save_file", refuse)
    monkeypatch.setattr(dreamllm_edu.models.dreamllm.weights.PreTrainedModel, "save_pretrained", refuse)
    for job in (
        lambda: save_checkpoint(tmp_path / "run", shares_of(w=torch.zeros(3)), {"step": 2}, keep=1),
        lambda: save_trained(make_tiny(2), tmp_path / "t.safetensors"),
        lambda: make_tiny(2).save_pretrained(tmp_path / "a"),
    ):
        with pytest.raises(OSError, match="No space left"):
            job()
    assert fingerprint(tmp_path) == before


class Bomb:
    """Runs a command when unpickled."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def damage(kind, folder, tmp_path):
    """Spoil a whole checkpoint in one of many ways."""
    tensors, manifest = folder / "rank-00000.safetensors", folder / "manifest.json"
    whole, said = tensors.read_bytes(), json.loads(manifest.read_text())
    texts = {
        "manifest cut": manifest.read_text()[:-30],
        "manifest empty": "",
        "manifest text": "no checkpoint",
        "manifest list": "[1]",
        "manifest number": "3",
        "manifest other": '{"step": 3}',
        "manifest without state": json.dumps({"files": said["files"]}),
        "manifest state list": json.dumps({"files": said["files"], "state": [1]}),
        "manifest files list": json.dumps({**said, "files": [1]}),
        "manifest files odd": json.dumps({**said, "files": {tensors.name: [1]}}),
    }
    if kind in texts:
        manifest.write_text(texts[kind])
    elif kind == "manifest not text":
        manifest.write_bytes(b"\xff\xfe\x00{")
    elif kind == "manifest gone":
        manifest.unlink()
    elif kind == "tensors gone":
        tensors.unlink()
    elif kind == "one bit":
        tensors.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    else:
        bad = {"cut": whole[:-300], "empty": b"", "text": b"no checkpoint", "longer": whole + b"x"}
        tensors.write_bytes(bad.get(kind) or (pickle.dumps(Bomb(tmp_path / "exploded")) if kind == "bomb" else b""))


DAMAGES = ["bomb", "cut", "empty", "text", "longer", "one bit", "tensors gone", "manifest gone", "manifest cut",
           "manifest empty", "manifest text", "manifest not text", "manifest list", "manifest number", "manifest other",
           "manifest without state", "manifest state list", "manifest files list",
           "manifest files odd"]  # fmt: skip


def short_run(folder, steps=4):
    """A layer after four steps, with a checkpoint after each; the rows of its log."""
    torch.manual_seed(0)
    return train_part(
        torch.nn.Linear(2, 2), lambda m, s, g: {"loss": m(torch.randn(3, 2, generator=g)).square().mean()}, steps, 1e-2,
        folder=folder, warmup=1, precision="no", save_every=2, progress=False,
    )


@pytest.mark.parametrize("all_of_them", [False, True], ids=["the newest", "all"])
@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_named_passed_over_and_runs_no_code(kind, all_of_them, tmp_path, capsys):
    """With one before it training resumes there; with none it starts anew. Either way the result is the same."""
    whole, history = short_run(None)
    folder = tmp_path / "run"
    short_run(folder)
    newest = folder / "step-00000004"
    if not all_of_them:  # a part keeps its last checkpoint alone: the one before is made by hand
        said = json.loads((newest / "manifest.json").read_text())
        half = tmp_path / "half"

        def stop(step, trainer):
            if step == 1:
                raise MemoryError
        with pytest.raises(MemoryError):
            torch.manual_seed(0)
            train_part(
                torch.nn.Linear(2, 2), lambda m, s, g: {"loss": m(torch.randn(3, 2, generator=g)).square().mean()}, 4,
                1e-2, folder=half, warmup=1, precision="no", save_every=2, progress=False, on_step=stop,
            )
        (half / "step-00000002").rename(folder / "step-00000002")
        assert said["state"]["run"] == last_checkpoint(half.parent / "run")[1]["run"]
    damage(kind, newest, tmp_path)
    capsys.readouterr()
    assert (last_checkpoint(folder, report=lambda text: None)[1] or {"step": 0})["step"] == (0 if all_of_them else 2)
    again, rows = short_run(folder)
    error = capsys.readouterr().err
    assert "step-00000004" in error and len(error.strip().splitlines()) == 1, "the damaged one is named"
    assert not (tmp_path / "exploded").exists()
    assert [row["loss"] for row in rows] == [row["loss"] for row in history]
    assert [row["step"] for row in read_log(folder / "log.jsonl")] == [0, 1, 2, 3]
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values()))
    assert last_checkpoint(folder)[1]["step"] == 4


def test_a_checkpoint_that_vouches_for_a_pickle_is_a_clear_error_and_runs_no_code(tmp_path):
    from dreamllm_edu.files import checksum

    save_checkpoint(tmp_path, shares_of(w=torch.ones(3)), {"step": 1, "run": {}})
    tensors, manifest = tmp_path / "step-00000001" / "rank-00000.safetensors", tmp_path / "step-00000001/manifest.json"
    tensors.write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    said = json.loads(manifest.read_text())
    said["files"] = {tensors.name: [tensors.stat().st_size, checksum(tensors)]}
    manifest.write_text(json.dumps(said))
    path, _ = last_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="step-00000001"):
        load_checkpoint(path, shares_of(w=torch.ones(3)))
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("rate, message", [(1e-3, "the loss is nan at step 2"), (2.0, "the gradient norm is nan")])
def test_a_number_that_is_not_finite_stops_a_part_at_once_and_changes_nothing(rate, message, tmp_path):
    layer, seen = torch.nn.Linear(2, 2), []

    def loss_of_step(model, step, generator):
        seen.append([p.detach().clone() for p in model.parameters()])
        loss = model(torch.ones(1, 2)).sum()
        if step == 2:  # the root's derivative at zero is infinite; times zero it is not a number
            loss = loss * float("nan") if rate < 1 else loss + ((loss - loss).abs().sqrt())
        return {"loss": loss}

    with pytest.raises(FloatingPointError, match=f"a part: {message}.*Lower the learning rate"):
        train_part(layer, loss_of_step, 4, rate, folder=tmp_path, warmup=1, precision="no", progress=False,
                   description="a part")
    assert len(seen) == 3 and all(torch.equal(a, b) for a, b in zip(seen[2], layer.parameters()))


def test_nothing_in_the_package_unpickles_freely():
    for path in (ROOT / "dreamllm_edu").rglob("*.py"):
        code = path.read_text(encoding="utf8")
        for call in re.findall(r"torch\.load\([^\n]*", code):
            assert "weights_only=True" in call, f"{path.name}: {call}"
        assert not re.search(
            r"^\s*(import|from) (pickle|joblib|dill|shelve)\b|allow_pickle=True|weights_only=False", code, re.M
        ), path.name


def test_a_pickled_checkpoint_folder_runs_no_code(tmp_path):
    make_tiny().save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").unlink()
    (tmp_path / "a" / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    with pytest.raises(Exception):  # noqa: B017  any refusal will do
        DreamLLM.from_pretrained(tmp_path / "a")
    assert not (tmp_path / "exploded").exists()


def test_json_state_of_documents_is_plain_json(tmp_path):
    write_jsonl([Document(["a\u2028b", Dream(), picture(1, 4)], 1)], tmp_path / "a.jsonl")
    lines = (tmp_path / "a.jsonl").read_bytes().split(b"\n")
    assert len(lines) == 2 and json.loads(lines[0])["given"] == 1
