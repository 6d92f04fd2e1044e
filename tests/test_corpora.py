"""Corpora in their published forms: what is read, what is refused, and that nothing shifts, is lost or is read
twice."""

import copy
import gzip
import io
import itertools
import json
import multiprocessing
import pickle
import random
import tarfile
import tracemalloc
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dreamllm_edu.data import readers as c
from dreamllm_edu.data import shards
from dreamllm_edu.data.lanes import Lane, lanes_of
from dreamllm_edu.data.shards import json_items
from dreamllm_edu.data.tasks import load, to_document
from dreamllm_edu.data.world import World
from dreamllm_edu.models.dreamllm.official import interleaved_document

from conftest import picture


def png(seed=0):
    """The bytes of a small picture."""
    buffer = io.BytesIO()
    picture(seed, size=16).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def images(tmp_path):
    """A folder with 0.png ... 9.png, and a secret beside it."""
    (tmp_path / "images" / "sub").mkdir(parents=True)
    for i in range(10):
        (tmp_path / "images" / f"{i}.png").write_bytes(png(i))
    (tmp_path / "images" / "sub" / "a.png").write_bytes(png(50))
    (tmp_path / "secret.png").write_bytes(png(99))
    return tmp_path / "images"


def turns(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def read_all(corpus):
    return [item for shard in corpus.shards for item in corpus.read(shard)]


def shape(items):
    """`r` for a record, `-` for a broken one, in order."""
    return "".join("r" if isinstance(item, c.Record) else "-" for item in items)


def numbered(folder, counts, name="numbers", bad=(), weight=1.0):
    """A LLaVA corpus of JSON lines, `counts[s]` records in shard s, each named in its answer; those in `bad` are no
    records."""
    files = []
    for s, count in enumerate(counts):
        files.append(folder / f"{name}-{s}.jsonl")
        rows = [{"conversations": 7 if (s, i) in bad else turns("which?", f"{name} {s} {i}")} for i in range(count)]
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return c.llava(name, files, weight=weight)


def answers(lane, n):
    return [record.parts[-1].strip() for record in itertools.islice(lane, n)]


def one_epoch(corpus, lane, lanes, epoch=0, seed=0):
    """The answers of one epoch of a lane."""
    reader, found = Lane([corpus], lane, lanes, seed), []
    for record in reader:
        now = reader.state()["corpora"][corpus.name]["epoch"]
        if now > epoch:
            return found
        if now == epoch:
            found.append(record.parts[-1].strip())


# ---- pictures and records


def test_a_picture_has_one_key_wherever_it_lies(images):
    data, path = (images / "3.png").read_bytes(), str(images / "3.png")
    there, here = c.Picture(path, "there"), c.Picture(data, "here")
    assert there.key == here.key and len(here.key) == 32 and there.key != c.Picture(str(images / "4.png"), "").key
    assert there.open().mode == "RGB" and there.open().tobytes() == here.open().tobytes()
    assert len(repr(here)) < 60, "the bytes do not belong into messages"


@pytest.mark.parametrize("source", [b"", png()[:60], b"no picture", "/no/such/file.png", "."])
def test_a_bad_picture_is_named(source):
    with pytest.raises(ValueError, match="^the third: "):
        c.Picture(source, "the third").open()


def test_check_looks_without_decoding(images):
    (images / "empty.png").write_bytes(b"")
    (images / "half.png").write_bytes(png()[:60])
    for name in ("empty.png", "missing.png"):
        with pytest.raises(ValueError, match="it: "):
            c.Picture(str(images / name), "it").check()
    c.Picture(str(images / "half.png"), "it").check()


def test_a_record_learns_what_is_not_given():
    assert c.Record(["a", "b", "c"], 2).learn == [False, False, True]
    for bad in (
        dict(parts=[]),
        dict(parts=[3]),
        dict(parts=["a"], given=2),
        dict(parts=["a"], given=-1),
        dict(parts=["a"], learn=[]),
        dict(parts=["a", "b"], given=1, learn=[True, True]),
        dict(parts=["\ud800"]),
    ):
        with pytest.raises(ValueError):
            c.Record(**bad)


# ---- JSON


def test_lists_are_read_in_any_pieces():
    rng, leaves = random.Random(0), [1.5, "a\"]},\\", None, "🦊\n", True, 12345]
    make = lambda depth: {"k\\\"}": make(depth - 1), "é]": [make(depth - 1)] * 2} if depth else rng.choice(leaves)
    whole = [make(rng.randrange(3)) for _ in range(30)]
    for ascii_only in (True, False):
        data = json.dumps(whole, ensure_ascii=ascii_only, indent=rng.choice([None, 1])).encode()
        for piece in (1, 3, 16, 10_000):
            assert list(json_items(io.BytesIO(data), piece)) == whole
            assert list(json_items(io.BytesIO(b"\xef\xbb\xbf" + data), piece)) == whole  # a byte order mark


@pytest.mark.parametrize(
    "text, expected",
    [
        ('[{"a": 1}, {"a": }, {"a": 3}]', "r-r"),
        ('[{"a": 1}, nope, {"a": 3}]', "r-r"),
        ('[{"a": 1}, {"a": [}, {"a": 3}]', "r--"),
        ('[{"a": 1}, {"a"', "r-"),
        ('[{"a": 1},', "r-"),
        ("", "-"),
        ('{"a": 1}', "r"),
        ('{"a": 1}\n{"a": 2}', "rr"),
        ('[{"a": 1}] more', "r-"),
        ('[{"a": 1}}, {"a": 2}]', "r-r"),
        ("[" * 100_000, "-"),
        ("[]", ""),
    ],
)
def test_damaged_json(text, expected):
    for piece in (1, 5, 10_000) if len(text) < 1000 else (10_000,):
        found = list(json_items(io.BytesIO(text.encode()), piece))
        assert "".join("-" if isinstance(item, c.Broken) else "r" for item in found) == expected, (piece, found)


def test_a_huge_record_is_passed_over(tmp_path, monkeypatch):
    corpus = numbered(tmp_path, [3])
    lines = (tmp_path / "numbers-0.jsonl").read_text().splitlines()
    huge = json.dumps({"conversations": turns("q", "x" * 5000)})
    (tmp_path / "numbers-0.jsonl").write_text("\n".join([lines[0], huge, lines[2]]))
    assert shape(read_all(corpus)) == "rrr"
    monkeypatch.setattr(shards, "MAX_BYTES", 1000)
    found = read_all(corpus)
    assert shape(found) == "r-r" and "1,000 bytes" in str(found[1]) and found[2].parts[-1] == " numbers 0 2"
    (tmp_path / "list.json").write_text("[" + ",".join([lines[0], huge, lines[2]]) + "]")
    assert shape(read_all(c.llava("list", tmp_path / "list.json"))) in (
        "r-",
        "rrr",
    )  # the list is read in larger pieces


# ---- LLaVA


LLAVA = [
    {"id": "0", "image": "0.png", "conversations": turns("<image>\nWhat?", "A fox.", "Sure? <dream>", "Yes, <image>.")},
    {"id": "1", "image": "sub/a.png", "conversations": turns("Describe it.\n<image>", "It is small.")},
    {"id": "2", "conversations": turns("Is <image> a word?", "Yes.")},
    {"id": "3", "image": ["1.png", "2.png"], "conversations": turns("<image> or <image>?", "The first.")},
]


def test_llava_parts(images, tmp_path):
    half = len(LLAVA) // 2
    (tmp_path / "a.json").write_text(json.dumps(LLAVA[:half], indent=2))
    (tmp_path / "b.json").write_text(json.dumps(LLAVA[half:]))
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, LLAVA)))
    found = read_all(c.llava("chat", [tmp_path / "a.json", tmp_path / "b.json"], images))
    assert [record.parts for record in read_all(c.llava("chat", tmp_path / "c.jsonl", images))] == [
        record.parts for record in found
    ]
    at = lambda name: c.Picture(str(images / name), "")
    assert found[0].parts == [
        "User: ",
        at("0.png"),
        "\nWhat?\nAssistant:",
        " A fox.\n",
        "User: Sure? <dream>\nAssistant:",
        " Yes, <image>.",
    ]
    assert found[0].given == 3 and found[0].learn == [False, False, False, True, False, True]
    assert (
        found[1].parts == ["User: Describe it.\n", at("sub/a.png"), "\nAssistant:", " It is small."]
        and found[1].given == 3
    )
    assert found[2].parts == ["User: Is <image> a word?\nAssistant:", " Yes."] and found[2].given == 1
    assert found[3].parts == ["User: ", at("1.png"), " or ", at("2.png"), "?\nAssistant:", " The first."]
    document = found[0].document()
    assert (
        document.given == 3
        and document.pictures[0].tobytes() == picture(0, 16).tobytes()
        and document.name == found[0].name
    )


BAD_LLAVA = {
    "traversal": {"image": "../secret.png"},
    "inside": {"image": "sub/../../secret.png"},
    "absolute": {"image": "/etc/passwd"},
    "chain": {"image": "a::http://x/y"},
    "backslash": {"image": "..\\secret.png"},
    "address": {"image": "http://x/y.png"},
    "number": {"image": 7},
    "nul": {"image": "a\0.png"},
    "no turns": {"conversations": []},
    "text": {"conversations": "hello"},
    "role": {"conversations": [{"from": ["human"], "value": "a"}]},
    "turn": {"conversations": ["a", "b"]},
    "order": {"conversations": turns("a", "b") + turns("c", "d")[1:]},
    "value": {"conversations": [{"from": "human", "value": 3}]},
    "marks": {"conversations": turns("no placeholder", "a")},
    "more marks": {"conversations": turns("<image> <image>", "a")},
    "empty answer": {"conversations": turns("<image>", " ")},
    "surrogate": {"conversations": turns("<image>", "\ud800")},
}


@pytest.mark.parametrize("kind", BAD_LLAVA)
def test_llava_refuses_in_place(kind, images, tmp_path):
    bad = {"image": "0.png", "conversations": turns("<image>", "fine"), **BAD_LLAVA[kind]}
    (tmp_path / "a.json").write_text(json.dumps([LLAVA[0], bad, LLAVA[1]]))
    found = read_all(c.llava("chat", tmp_path / "a.json", images))
    assert shape(found) == "r-r" and found[2].parts[-1] == " It is small."
    assert str(found[1]).startswith("chat, a.json #1: "), found[1]


NO_UTF8 = b'{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "\xff"}]}'


@pytest.mark.parametrize("bad", [b"7", b'"text"', b"null", b"[1, 2]", NO_UTF8])
def test_llava_refuses_what_is_no_record(bad, tmp_path):
    good = json.dumps(LLAVA[2]).encode()
    for name, data in (
        ("a.json", b"[" + good + b"," + bad + b"," + good + b"]"),
        ("a.jsonl", good + b"\n" + bad + b"\n\n" + good),
    ):
        (tmp_path / name).write_bytes(data)
        assert shape(read_all(c.llava("chat", tmp_path / name))) == "r-r", name


def test_llava_without_a_folder_says_so(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(LLAVA))
    found = read_all(c.llava("chat", tmp_path / "a.json"))
    assert shape(found) == "--r-" and "images=" in str(found[0])


# ---- LAION


def write_tar(path, members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def pair(i, **meta):
    meta = json.dumps({"key": f"{i:09d}", "width": 16, "height": 16, "status": "success", **meta}).encode()
    return [(f"{i:09d}.png", png(i)), (f"{i:09d}.txt", f"picture {i}".encode()), (f"{i:09d}.json", meta)]


def tars(folder, n=3, each=8):
    return [
        write_tar(folder / f"{s:05d}.tar", [file for i in range(each) for file in pair(s * each + i)]) for s in range(n)
    ]


def test_laion_pairs(tmp_path):
    files = tars(tmp_path)
    found = read_all(c.laion("pairs", files))
    for i, record in enumerate(found):
        here = c.Picture(png(i), "")
        assert record.parts in ([f"picture {i}:", here], [here, f" picture {i}"]) and record.learn == [False, True]
    draws = [isinstance(record.parts[1], c.Picture) for record in found]
    assert 4 < sum(draws) < 20, "about half of the pairs should be drawn"
    assert draws == [isinstance(record.parts[1], c.Picture) for record in read_all(c.laion("again", files))]
    assert all(isinstance(record.parts[1], c.Picture) for record in read_all(c.laion("pairs", files, task="draw")))
    assert all(isinstance(record.parts[0], c.Picture) for record in read_all(c.laion("pairs", files, task="caption")))
    with pytest.raises(ValueError, match="task"):
        c.laion("pairs", files, task="paint")


def test_laion_captions_and_limits(tmp_path):
    members = pair(0)[:2] + [pair(1)[0], ("000000001.json", b'{"caption": "from json"}')] + pair(2, width=8)
    path = write_tar(tmp_path / "a.tar", members + pair(3, similarity=0.2) + pair(4, similarity=0.3))
    assert read_all(c.laion("x", path, task="caption"))[1].parts[1] == " from json"
    assert shape(read_all(c.laion("x", path))) == "rrrrr"
    assert shape(read_all(c.laion("x", path, min_side=16))) == "rr-rr"
    assert shape(read_all(c.laion("x", path, min_similarity=0.3))) == "rrr-r"


BAD_PAIRS = {
    "no caption": pair(1)[:1],
    "no picture": pair(1)[1:],
    "empty caption": [pair(1)[0], ("000000001.txt", b" ")],
    "empty picture": [("000000001.png", b""), pair(1)[1]],
    "two pictures": pair(1) + [("000000001.jpg", b"x")],
    "key twice": pair(1)[:2] + pair(1)[:2],
    "bad utf8": [pair(1)[0], ("000000001.txt", b"\xff\xfe")],
    "caption null": [pair(1)[0], ("000000001.json", b'{"caption": null}')],
    "bad json": [pair(1)[0], ("000000001.json", b"{")],
    "json list": [pair(1)[0], ("000000001.json", b"[1]")],
}


@pytest.mark.parametrize("kind", BAD_PAIRS)
def test_laion_refuses_in_place(kind, tmp_path):
    found = read_all(c.laion("x", write_tar(tmp_path / "a.tar", pair(0) + BAD_PAIRS[kind] + pair(2))))
    assert shape(found) == "r-r" and "000000001" in str(found[1])
    assert found[2].pictures == [c.Picture(png(2), "")] and any("picture 2" in str(part) for part in found[2].parts)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_cut_tar_loses_only_its_end(mode, tmp_path):
    whole = write_tar(tmp_path / "a.tar", [file for i in range(8) for file in pair(i)], mode)
    data, expected = whole.read_bytes(), read_all(c.laion("x", whole))
    for size in [0, 1] + [len(data) * k // 12 for k in range(1, 12)]:
        (tmp_path / "cut.tar").write_bytes(data[:size])
        found = read_all(c.laion("x", tmp_path / "cut.tar"))
        good = [item for item in found if isinstance(item, c.Record)]
        assert shape(found) in ("r" * len(good), "r" * len(good) + "-") and [g.parts for g in good] == [
            e.parts for e in expected[: len(good)]
        ], size
        assert len(good) < 8 and (shape(found).endswith("-") or mode == "w" and size % 512 == 0), size


def test_other_members_do_no_harm(tmp_path):
    link = tarfile.TarInfo("000000001.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in pair(0) + [("README", b"x"), ("../../evil.png", png()), ("../../evil.txt", b"evil")]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        tar.addfile(link)
    before = sorted(tmp_path.rglob("*"))
    assert shape(read_all(c.laion("x", tmp_path / "a.tar"))) == "rr", (
        "a member's name is only a key; links are no pictures"
    )
    assert sorted(tmp_path.rglob("*")) == before, "nothing is ever unpacked to the disk"


# ---- MMC4


def info(name, index, similarity=0.3):
    return {
        "image_name": name,
        "raw_url": f"https://x/{name}",
        "matched_text_index": index,
        "matched_sim": similarity,
        "face_detections": None,
    }


def page(infos, texts=("A.", " B. ", "C."), **more):
    return {"text_list": list(texts), "image_info": infos, "url": "https://x", "could_have_url_duplicate": 0, **more}


def test_mmc4_order(images, tmp_path):
    at = lambda name: c.Picture(str(images / name), "")
    rows = [
        page([info("0.png", 2), info("1.png", 1)]),
        page([info("0.png", 0, 0.25), info("1.png", 1, 0.2499), info("2.png", 0, None)]),
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    before, after = (read_all(c.mmc4("x", tmp_path / "a.jsonl", images, place=place)) for place in ("before", "after"))
    assert (
        before[0].parts == ["A.", at("1.png"), "B.", at("0.png"), "C."]
        and before[0].given == 0
        and all(before[0].learn)
    )
    assert after[0].parts == ["A. B.", at("1.png"), "C.", at("0.png")]
    assert before[1].parts == [at("0.png"), at("2.png"), "A. B. C."] and after[1].parts == [
        "A.",
        at("0.png"),
        at("2.png"),
        "B. C.",
    ]
    assert len(read_all(c.mmc4("x", tmp_path / "a.jsonl", images, threshold=None))[1].pictures) == 3
    official = interleaved_document(rows[0]["text_list"], [picture(1), picture(0)], [1, 2])
    assert [p if isinstance(p, str) else "P" for p in official.parts] == [
        p if isinstance(p, str) else "P" for p in after[0].parts
    ]


def test_mmc4_packed_in_every_way(images, tmp_path):
    lines = "\n".join(json.dumps(page([info(f"{i}.png", 1)], texts=("A.", f"{i}"))) for i in range(6)).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    with zipfile.ZipFile(tmp_path / "a.jsonl.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jsonl", lines)
    write_tar(tmp_path / "a.tar", [(f"somewhere/{i}.png", png(i)) for i in range(6)])
    plain, *others = (
        read_all(c.mmc4("x", tmp_path / name, images)) for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zip")
    )
    assert shape(plain) == "rrrrrr" and all([r.parts for r in other] == [r.parts for r in plain] for other in others)
    beside = read_all(c.mmc4("x", tmp_path / "a.jsonl", tmp_path / "{stem}.tar"))
    assert [r.document() for r in beside] == [r.document() for r in plain]
    for name in ("a.jsonl.gz", "a.jsonl.zip"):
        (tmp_path / f"cut-{name}").write_bytes((tmp_path / name).read_bytes()[:-40])
        found = read_all(c.mmc4("x", tmp_path / f"cut-{name}", images))
        assert (
            shape(found).endswith("-")
            and shape(found)[:-1] == "r" * (len(found) - 1)
            and "cut off or damaged" in str(found[-1])
        )
    (tmp_path / "bad.jsonl.gz").write_bytes(b"no gzip at all")
    assert shape(read_all(c.mmc4("x", tmp_path / "bad.jsonl.gz", images))) == "-"


@pytest.mark.parametrize(
    "bad",
    [
        page([]),
        page([info("0.png", 3)]),
        page([info("0.png", -1)]),
        page([info("0.png", True)]),
        page([info("0.png", 0, "high")]),
        page(["x"]),
        page([info("0.png", 0)], texts=[1]),
        page([info("../secret.png", 0)]),
        page([info(None, 0)]),
        page([info("0.png", 0, 0.1)]),
        page([info("0.png", 0, float("nan"))]),
        page([info("0.png", 0), info("1.png", -1)]),
        {"text_list": ["a"]},
        {"image_info": []},
    ],
)
def test_mmc4_refuses_in_place(bad, images, tmp_path):
    good = [page([info("0.png", 0)], texts=[text]) for text in ("first", "last")]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [good[0], bad, good[1]])))
    found = read_all(c.mmc4("x", tmp_path / "a.jsonl", images))
    assert shape(found) == "r-r" and found[2].parts[-1] == "last"


def test_mmc4_missing_pictures(images, tmp_path):
    rows = [page([info("0.png", 0), info("gone.png", 1)]), page([info("0.png", 0)], texts=["good"])]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write_tar(tmp_path / "a.tar", [("0.png", png(0))])
    for place in (images, tmp_path / "a.tar"):
        lane = Lane([c.mmc4("x", tmp_path / "a.jsonl", place)], 0, 1)
        assert [next(lane).parts[-1] for _ in range(2)] == ["good"] * 2 and lane.skipped == 2
        kept = read_all(c.mmc4("x", tmp_path / "a.jsonl", place, missing="picture"))
        assert [len(record.pictures) for record in kept] == [1, 1] and kept[0].parts[1:] == ["A. B. C."]
    for option in ({"missing": "all"}, {"place": "beside"}):
        with pytest.raises(ValueError, match=next(iter(option))):
            c.mmc4("x", tmp_path / "a.jsonl", images, **option)


def test_instruct_mmc4(images, tmp_path):
    rows = [
        page([info("0.png", 0, 0.1)], instruction=" Tell me. "),
        page([info("0.png", 0)]),
        page([info("1.png", 2)], instruction="Again."),
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    found = read_all(c.instruct_mmc4("x", tmp_path / "a.json", images))
    assert shape(found) == "r-r" and found[0].given == 1 and found[0].learn == [False, True, True, True]
    assert found[0].parts == ["User: Tell me.\nAssistant:", " A.", c.Picture(str(images / "0.png"), ""), "B. C."]


# ---- OBELICS, subjects, emoji


def test_obelics(images, tmp_path):
    urls = [f"https://x/{i}.png" for i in range(8)]
    (images / c.url_name(urls[1])).write_bytes(png(1))
    rows = {"images": [[urls[0], None], [None, urls[1], None], [None], [urls[2], None], [urls[3]]],
            "texts": [[None, "zero"], ["one", None, "more"], ["only text"], ["both", None], [None]],
            "metadata": ["[]"] * 5, "general_metadata": ["{}"] * 5}
    pq.write_table(pa.table(rows), tmp_path / "plain.parquet", row_group_size=2)
    found = read_all(c.obelics("x", tmp_path / "plain.parquet"))
    assert shape(found) == "--r--" and "fetch=True" in str(found[0]) and "one of the two" in str(found[3])
    found = read_all(c.obelics("x", tmp_path / "plain.parquet", images))
    assert found[1].parts == ["one", c.Picture(str(images / c.url_name(urls[1])), ""), "more"] and found[1].given == 0
    kept = read_all(c.obelics("x", tmp_path / "plain.parquet", images, missing="picture"))
    assert [record.parts for record in kept[:3]] == [["zero"], found[1].parts, ["only text"]]
    fetching = read_all(c.obelics("x", tmp_path / "plain.parquet", fetch=True))
    assert fetching[0].parts == [c.Picture(urls[0], ""), "zero"], (
        "with fetch the address itself is the picture, asked when it is opened"
    )
    stored = {**rows, "images_bytes": [[png(0), None], [None, png(1), None], [None], [png(2), None], [b""]]}
    pq.write_table(pa.table(stored), tmp_path / "bytes.parquet")
    found = read_all(c.obelics("x", tmp_path / "bytes.parquet"))
    assert shape(found) == "rrr--" and found[0].parts == [c.Picture(png(0), ""), "zero"]


def test_damaged_parquet(tmp_path):
    rows = {"images": [[None]] * 200, "texts": [[f"text {i} " + "x" * i] for i in range(200)]}
    pq.write_table(pa.table(rows), tmp_path / "a.parquet", row_group_size=50, compression="none", use_dictionary=False)
    data = (tmp_path / "a.parquet").read_bytes()
    assert shape(read_all(c.obelics("x", tmp_path / "a.parquet"))) == "r" * 200
    (tmp_path / "a.parquet").write_bytes(data[:-100])
    assert shape(read_all(c.obelics("x", tmp_path / "a.parquet"))) == "-"
    (tmp_path / "a.parquet").write_bytes(data.replace(b"text 60 ", b"text\xff60 "))
    assert shape(read_all(c.obelics("x", tmp_path / "a.parquet"))) == "r" * 60 + "-" + "r" * 139
    del rows["texts"]
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    assert set(shape(read_all(c.obelics("x", tmp_path / "a.parquet")))) == {"-"}


def test_subjects(images, tmp_path):
    row = {"subject_image": "0.png", "subject_text": "fox", "prompt": "a fox at the sea", "target_image": "1.png"}
    (tmp_path / "a.jsonl").write_text(
        "\n".join(map(json.dumps, [row, {**row, "target_image": None}, {**row, "prompt": 3}, row]))
    )
    found = read_all(c.subjects("x", tmp_path / "a.jsonl", images))
    at = lambda name: c.Picture(str(images / name), "")
    assert shape(found) == "r--r" and found[0].learn == [False, False, False, True]
    assert found[0].parts == ["User: ", at("0.png"), " fox. Draw: a fox at the sea\nAssistant:", at("1.png")]


def test_the_emoji_world_is_a_corpus():
    world = World()
    corpus = c.emoji("toys", ("pairs/caption", "subjects"), world)
    captions = [row for row in load("pairs", "train", world) if row["task"] == "caption"]
    for key, rows in (("pairs/caption", captions), ("subjects", load("subjects", "train", world))):
        found = list(corpus.read(key))
        assert len(found) == len(rows)
        for i in (0, 77, len(rows) - 1):
            expected, document = to_document(rows[i], world), found[i].document()
            assert document.parts == expected.parts and document.given == expected.given
    for bad in ("pairs/paint", "monsters"):
        with pytest.raises(ValueError):
            c.emoji("toys", bad, world)


def test_typed_markers_stay_text(processor, images, tmp_path):
    (tmp_path / "a.json").write_text(
        json.dumps([{"conversations": turns("<dream> <image> <dream_start>", "<image_start> <dream>")}])
    )
    (tmp_path / "b.jsonl").write_text(json.dumps(page([info("0.png", 0)], texts=["<dream> <image>"])))
    for record, blocks in (
        (read_all(c.llava("x", tmp_path / "a.json"))[0], 0),
        (read_all(c.mmc4("x", tmp_path / "b.jsonl", images))[0], 1),
    ):
        row = processor.layout.encode(record.document().parts)
        starts = [processor.layout.id[token] for token in ("<dream_start>", "<image_start>")]
        assert [row.input_ids.count(i) for i in starts] == [blocks, blocks]


# ---- a mixture


def mixture(root):
    (root / "images").mkdir(exist_ok=True)
    (root / "images" / "0.png").write_bytes(png(0))
    tars(root, 2, 4)
    for s in range(3):
        (root / f"chat-{s}.json").write_text(
            json.dumps([{"image": "0.png", "conversations": turns("<image>", f"chat {s} {i}")} for i in range(4)])
        )
    return {"pairs": {"format": "laion", "shards": "0*.tar", "weight": 2, "task": "draw"},
            "chat": {"format": "llava", "shards": ["chat-2.json", "chat-[01].json"], "images": "images"},
            "toys": {"format": "emoji", "kinds": ["articles"], "weight": 0}}


def test_open_corpora(tmp_path):
    found = c.open_corpora(mixture(tmp_path), tmp_path)
    assert [(corpus.name, corpus.weight) for corpus in found] == [("pairs", 2), ("chat", 1.0), ("toys", 0)]
    assert [s.rsplit("/", 1)[1] for s in found[1].shards] == ["chat-2.json", "chat-0.json", "chat-1.json"]
    assert all(isinstance(record.parts[1], c.Picture) for record in read_all(found[0]))
    lane, same = Lane(found, 0, 2), Lane(pickle.loads(pickle.dumps(found)), 0, 2)
    for _ in range(20):
        one, other = next(lane), pickle.loads(pickle.dumps(next(same)))
        assert one == other and one.corpus in ("pairs", "chat")
        assert one.document().pictures


def of(format, shards="0*.tar", **options):
    return {"it": {"format": format, "shards": shards, **options}}


@pytest.mark.parametrize(
    "change, message",
    [
        (of("laion", "*.tarr"), r"'\*\.tarr' in "),
        (of("lion"), "format"),
        (of("laion", ()), "needs 'shards'"),
        (of("laion", tusk=1), "'tusk'"),
        (of("laion", weight=-1), "weight"),
        (of("laion", weight=float("nan")), "weight"),
        (of("laion", weight="1"), "weight"),
        (of("laion", weight=0), "empty"),
        ({}, "empty mixture"),
        (of("mmc4", "chat-0.json"), "images"),
        (of("llava", "chat-0.json", images="gone"), "gone"),
        (of("mmc4", "chat-?.json", images="{stem}.tar"), "chat-0.tar"),
        (of("laion", "hf://datasets/a/b/*.tar"), "network=True"),
        (of("laion", "https://x/0.tar"), "network=True"),
        (of("llava", "chat-0.json", images="https://x/"), "network=True"),
        ({"it": {"format": "emoji", "kinds": []}}, "shard"),
    ],
)
def test_a_bad_mixture_says_what_is_wrong(change, message, tmp_path):
    mixture(tmp_path)
    with pytest.raises(ValueError, match=message):
        c.open_corpora(change, tmp_path)


def test_adapters_stay_off_the_network():
    for make in (c.llava, c.mmc4, c.instruct_mmc4, c.subjects):
        with pytest.raises(ValueError, match="network=True"):
            make("x", "https://x/a.json", "images")
        with pytest.raises(ValueError, match="network=True"):
            make("x", "a.json", "hf://datasets/a/b")
    for make in (c.laion, c.obelics):
        with pytest.raises(ValueError, match="network=True"):
            make("x", ["a", "https://x/a"])
    assert c.laion("x", "https://x/a.tar", network=True).shards == ("https://x/a.tar",)


def test_streams_through_fsspec():
    import fsspec
    with fsspec.open("memory://corpus/a.tar", "wb") as file:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for name, data in pair(0) + pair(1):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        file.write(buffer.getvalue())
    with fsspec.open("memory://corpus/0.png", "wb") as file:
        file.write(png(0))
    with fsspec.open("memory://corpus/a.jsonl", "wb") as file:
        file.write(json.dumps(page([info("0.png", 0)])).encode())
    found = c.open_corpora(
        {
            "t": {"format": "laion", "shards": "memory://corpus/*.tar"},
            "m": {"format": "mmc4", "shards": "memory://corpus/a.jsonl", "images": "memory://corpus"},
        },
        "/nowhere",
        network=True,
    )
    assert (
        shape(read_all(found[0])) == "rr"
        and read_all(found[1])[0].document().pictures[0].tobytes() == picture(0, 16).tobytes()
    )


# ---- lanes


@pytest.mark.parametrize("counts, lanes", [([7], 4), ([5, 9, 2], 4), ([3, 3, 3, 3, 3], 2), ([4, 4], 1), ([10, 1], 3)])
def test_each_record_comes_once_an_epoch(counts, lanes, tmp_path):
    corpus = numbered(tmp_path, counts)
    everything = sorted(f"numbers {s} {i}" for s, count in enumerate(counts) for i in range(count))
    orders = [[one_epoch(corpus, lane, lanes, epoch) for lane in range(lanes)] for epoch in range(3)]
    for order in orders:
        assert sorted(answer for share in order for answer in share) == everything
    if len(counts) * lanes > 2:
        assert orders[0] != orders[1] or orders[1] != orders[2], "epochs should be shuffled"
    assert orders[0] == [one_epoch(corpus, lane, lanes, 0) for lane in range(lanes)]


def test_seed_and_name_decide_the_order(tmp_path):
    corpus = numbered(tmp_path, [2] * 12)
    assert one_epoch(corpus, 0, 1, seed=0) != one_epoch(corpus, 0, 1, seed=1)


def test_processes_only_share_the_lanes(tmp_path):
    found = [numbered(tmp_path, [9, 4], "a"), numbered(tmp_path, [6, 5, 7], "b", bad={(0, 2), (2, 2)}, weight=0.5)]
    union = []
    for processes in (1, 2, 4, 8):
        drawn = Counter()
        for rank in range(processes):
            mine = {lane: Lane(found, lane, 8) for lane in lanes_of(rank, processes, 8)}
            for _ in range(12):
                drawn.update((lane, next(reader).name) for lane, reader in mine.items())
        union.append(drawn)
    assert union[0] == union[1] == union[2] == union[3] and sum(union[0].values()) == 96


@pytest.mark.parametrize("rank, world, lanes", [(0, 3, 8), (2, 2, 8), (-1, 2, 8), (0, 0, 8), (0, 1, 0)])
def test_lanes_of_refuses(rank, world, lanes):
    with pytest.raises(ValueError):
        lanes_of(rank, world, lanes)


@pytest.mark.parametrize("lane, lanes", [(0, 1), (1, 3)])
def test_resume_from_every_place(lane, lanes, tmp_path):
    found = [
        numbered(tmp_path, [5, 6, 3], "a", bad={(0, 0), (1, 5), (2, 1)}),
        numbered(tmp_path, [7], "b", weight=0.4, bad={(0, 6)}),
    ]
    reader, said, states, skipped = Lane(found, lane, lanes, seed=3), [], [Lane(found, lane, lanes, seed=3).state()], []
    for _ in range(60):
        said += answers(reader, 1)
        states.append(json.loads(json.dumps(reader.state())))
        skipped.append(reader.skipped)
    assert states[-1]["corpora"]["a"]["epoch"] >= 2, "the test should cross epochs"
    for place in range(50):
        again = Lane(found, lane, lanes, seed=3, state=states[place])
        assert (
            answers(again, 10) == said[place : place + 10]
            and again.skipped == skipped[place + 9]
            and again.state() == states[place + 10]
        )


def test_resume_in_the_middle_of_a_tar(tmp_path):
    corpus = c.laion("x", tars(tmp_path, 2, 5))
    said = [record for record in itertools.islice(Lane([corpus], 0, 1), 14)]
    for place in range(10):
        reader = Lane([corpus], 0, 1)
        list(itertools.islice(reader, place))
        assert list(itertools.islice(Lane([corpus], 0, 1, state=reader.state()), 4)) == said[place:place + 4]


def test_a_state_fits_only_its_own(tmp_path):
    found = [numbered(tmp_path, [5, 5], "a")]
    state = Lane(found, 0, 2).state()
    Lane(found, 0, 2, state=state)
    other = [numbered(tmp_path, [5, 5, 5], "a")]
    for corpora, lane, lanes, seed in ((found, 1, 2, 0), (found, 0, 4, 0), (found, 0, 2, 1), (other, 0, 2, 0)):
        with pytest.raises(ValueError, match="another"):
            Lane(corpora, lane, lanes, seed, state=state)
    for bad in (
        {},
        [],
        {**state, "corpora": 3},
        {**state, "drawn": "x"},
        {**state, "corpora": {"a": {"shards": state["corpora"]["a"]["shards"]}}},
    ):
        with pytest.raises(ValueError, match="state"):
            Lane(found, 0, 2, state=bad)
    for lane, lanes in ((2, 2), (-1, 2)):
        with pytest.raises(ValueError, match="lane"):
            Lane(found, lane, lanes)


def test_weights_are_respected(tmp_path):
    found = [numbered(tmp_path, [9], name, weight=weight) for name, weight in (("a", 5), ("b", 3), ("c", 2), ("d", 0))]
    count = Counter(record.corpus for lane in range(4) for record in itertools.islice(Lane(found, lane, 4), 500))
    assert sum(count.values()) == 2000 and count["d"] == 0
    for name, share in (("a", 0.5), ("b", 0.3), ("c", 0.2)):
        assert abs(count[name] - 2000 * share) < 4 * (2000 * share * (1 - share)) ** 0.5, count
    lanes = [[record.corpus for record in itertools.islice(Lane(found, lane, 4), 20)] for lane in range(2)]
    assert lanes[0] != lanes[1], "lanes should not toss the same coins"


def test_broken_records_are_counted_and_shift_nothing(tmp_path):
    bad = {(0, 1), (1, 0), (1, 3)}
    clean = [one_epoch(numbered(tmp_path, [5, 4]), lane, 3) for lane in range(3)]
    hurt, gone, notes, told = numbered(tmp_path, [5, 4], bad=bad), {f"numbers {s} {i}" for s, i in bad}, [], []
    for lane in range(3):
        assert one_epoch(hurt, lane, 3) == [answer for answer in clean[lane] if answer not in gone]
        for report, count in ((notes, notes.__len__), (told.append, told.__len__)):
            before, reader = count(), Lane([hurt], lane, 3, report=report)
            while reader.state()["corpora"]["numbers"]["epoch"] < 2:
                next(reader)
            assert reader.skipped == reader.state()["skipped"] == count() - before
    assert notes == told and {f"numbers-{s}.jsonl #{i}" for s, i in bad} == {
        note.split(", ")[1].split(":")[0] for note in notes
    }
    assert all(note.startswith("numbers, ") and "conversations" in note for note in notes)


def test_a_bad_picture_is_refused_by_its_reader(tmp_path):
    write_tar(tmp_path / "a.tar", [(n, d[:50] if n == "000000001.png" else d) for i in range(3) for n, d in pair(i)])
    notes = []
    lane = Lane([c.laion("x", tmp_path / "a.tar")], 0, 1, report=notes)
    names = [document.name for document in itertools.islice(lane.documents(), 4)]
    assert (
        [name[-1] for name in names] == ["0", "2", "0", "2"]
        and lane.skipped == 2
        and all("000000001.png" in note for note in notes)
    )


@pytest.mark.parametrize(
    "content", ["", "7\n8\n", json.dumps({"image": "gone.png", "conversations": turns("<image>", "a")})]
)
def test_nothing_usable_ends_in_an_error(content, images, tmp_path):
    (tmp_path / "a.jsonl").write_text(content)
    good = numbered(tmp_path, [3])
    bad = c.llava("bad", tmp_path / "a.jsonl", images, weight=0.3)
    with pytest.raises(ValueError, match="bad: a whole epoch without one usable record"):
        list(itertools.islice(Lane([good, bad], 0, 1), 200))


def test_no_picture_that_opens_ends_in_an_error(tmp_path):
    write_tar(
        tmp_path / "a.tar",
        [(name, data[:50] if name.endswith("png") else data) for i in range(3) for name, data in pair(i)],
    )
    with pytest.raises(ValueError, match="without one usable record"):
        next(Lane([c.laion("x", tmp_path / "a.tar")], 0, 1).documents())


def test_more_lanes_than_records(tmp_path):
    corpus = numbered(tmp_path, [2, 1], bad={(1, 0)})
    for lane in range(8):
        assert set(answers(Lane([corpus], lane, 8), 6)) <= {"numbers 0 0", "numbers 0 1"}


def test_corpora_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="same name"):
        Lane([numbered(tmp_path, [1]), numbered(tmp_path, [1])], 0, 1)


def peak(action):
    tracemalloc.start()
    action()
    size = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return size


def test_memory_stays_flat(tmp_path):
    def of_lane(n):
        path = tmp_path / f"many-{n}.jsonl"
        path.write_text("".join(json.dumps({"conversations": turns("Count.", f"{i}")}) + "\n" for i in range(n)))
        lane = Lane([c.llava("many", path)], 0, 1)
        return peak(lambda: Counter(len(record.parts) for record in itertools.islice(lane, n - 1)))

    def of_list(n):
        (tmp_path / "many.json").write_text(
            json.dumps([{"conversations": turns("Count. " * 20, f"{i} " * 20)} for i in range(n)])
        )
        return peak(lambda: Counter(map(type, read_shard(c.llava("many", tmp_path / "many.json")))))

    def of_tar(n):
        write_tar(
            tmp_path / "many.tar",
            [(f"{i}.{ending}", data) for i in range(n) for ending, data in (("txt", b"a"), ("png", b"x"))],
        )
        return peak(lambda: Counter(map(type, read_shard(c.laion("many", tmp_path / "many.tar")))))

    read_shard = lambda corpus: corpus.read(corpus.shards[0])
    assert of_lane(30_000) < of_lane(1_000) + 50_000
    assert of_list(12_000) < of_list(4_000) + 300_000  # both are longer than the pieces in which they are read
    assert of_tar(1_000) < of_tar(100) + 100_000


# ---- lanes in other processes and threads


def contents(lane, n):
    records = itertools.islice(lane, n)
    return [(record.name, [getattr(part, "source", part) for part in record.parts]) for record in records]


def put_contents(lane, n, queue):
    queue.put(contents(lane, n))


@pytest.mark.parametrize("method", [m for m in ("fork", "spawn") if m in multiprocessing.get_all_start_methods()])
def test_a_lane_that_has_begun_goes_on_in_workers(method, tmp_path):
    """After a fork the processes would share one position in the open file."""
    corpus, context = c.laion("t", tars(tmp_path, 2, 40)), multiprocessing.get_context(method)
    expected = contents(Lane([corpus], 0, 1), 70)
    lane, queue = Lane([corpus], 0, 1), context.Queue()
    contents(lane, 7)
    workers = [context.Process(target=put_contents, args=(lane, 63, queue)) for _ in range(2)]
    [worker.start() for worker in workers]
    assert contents(lane, 63) == expected[7:]
    assert [queue.get(timeout=120) for _ in workers] == [expected[7:]] * 2
    [worker.join(60) for worker in workers]


def test_a_lane_is_copied_pickled_and_shared_by_threads(tmp_path):
    corpus = c.laion("t", tars(tmp_path, 2, 40))
    expected = contents(Lane([corpus], 0, 1), 60)
    lane = Lane([corpus], 0, 1)
    contents(lane, 5)
    twins = [copy.deepcopy(lane), pickle.loads(pickle.dumps(lane))]
    assert [contents(twin, 20) for twin in twins] == [expected[5:25]] * 2
    assert contents(lane, 20) == expected[5:25], "a copy leaves the lane where it was"
    with ThreadPoolExecutor(4) as pool:
        drawn = [record for found in pool.map(lambda _: contents(lane, 8), range(4)) for record in found]
    assert sorted(map(repr, drawn)) == sorted(map(repr, expected[25:57]))
