"""The emoji world: what is held out stays out, and what the data says is true of the pixels."""
import ast
import copy
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from dreamllm_edu import data
from dreamllm_edu.data.tasks import KINDS, caption, load, scene_list, to_document
from dreamllm_edu.data.world import (
    HELD_OUT_STYLE,
    JUDGE_ONLY,
    SCENE_NAMES,
    STYLES,
    Scene,
    World,
    definition_split,
    make_splits,
    read_definitions,
)
from dreamllm_edu.documents.document import Document

from conftest import ROOT

DATA = ROOT / "data"
SPLITS = json.loads((DATA / "splits.json").read_text())
RECIPE = {
    name: value
    for node in ast.parse((DATA / "build.py").read_text(encoding="utf8")).body
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)
    for name, value in [(node.targets[0].id, node.value)]
    if name == "PACKAGES"
}["PACKAGES"]
PACKAGES = {key.value: value.value for key, value in zip(RECIPE.keys, RECIPE.values)}
TALK = [
    kind for kind in KINDS if kind != "articles"
]  # kinds whose words are all ours; articles hold WordNet's definitions


@pytest.fixture(scope="module")
def train(world):
    """kind -> training rows."""
    return {kind: getattr(data, kind)(world, "train") for kind in KINDS}


@pytest.fixture(scope="module")
def pixels():
    """(key, style) -> decoded RGB bytes of every stored picture, read without the library."""
    found = {}
    for path in (DATA / "pictures").glob("*.zip"):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                found[name.removesuffix(".png"), path.stem] = (
                    Image.open(io.BytesIO(archive.read(name))).convert("RGB").tobytes()
                )
    return found


def refs(rows):
    return {part["picture"] for row in rows for part in row["parts"] if part["picture"]}


def text_of(row):
    return "".join(part["text"] or "\n" for part in row["parts"])


# ---------------------------------------------------------------- the stored files

def test_counts(world, pixels):
    rows = [json.loads(line) for line in (DATA / "concepts.jsonl").read_text(encoding="utf8").splitlines()]
    assert len(rows) == 981 and len(world.concepts) == 821 and sum(row["group"] == "smileys" for row in rows) == 160
    assert len({row["key"] for row in rows}) == len({row["name"] for row in rows}) == 981
    count = Counter(style for _, style in pixels)
    assert all(count[style] == 981 for style in STYLES) and set(count) == {*STYLES, HELD_OUT_STYLE, *JUDGE_ONLY}
    for row in rows:
        assert {style for style in count if (row["key"], style) in pixels} == set(row["styles"]), row["name"]
    assert all(len(value) == 64 * 64 * 3 for value in pixels.values()), "64x64 RGB"
    assert 700 <= count[HELD_OUT_STYLE] and sum("definition" in row for row in rows) >= 450


def test_definitions_are_wordnet_and_split_without_overlap():
    lines = read_definitions()
    train, held = definition_split(lines)
    assert len(lines) > 117_000 and 2_200 < len(held) <= -(-len(lines) // 50) and len(train) + len(held) == len(lines)
    assert set(held) <= set(lines[::50]), (
        "what is held out was never among the lines that the shipped parts learned from"
    )
    assert all(": " in line for line in lines[:2000])
    assert any(line.startswith("entity: ") for line in lines[:5])


def test_no_held_out_definition_is_learned_elsewhere(world):
    meaning = lambda line: line.split(": ", 1)[1]
    train, held = definition_split(read_definitions())
    held = set(map(meaning, held))
    assert not held & set(map(meaning, train))
    lines, articles = read_definitions(), (DATA / "concepts.jsonl").read_text(encoding="utf8")
    count, shown = (
        Counter(map(meaning, lines)),
        {
            t["definition"]
            for row in map(json.loads, articles.splitlines())
            for t in (row, *row.get("hypernyms", []))
            if "definition" in t
        },
    )
    assert len(held) == len(lines[::50]) - sum(count[m] > 1 or m in shown for m in map(meaning, lines[::50])), (
        "no other line is spared"
    )
    written = "\n".join(part["text"] for row in load("articles", "train", world) for part in row["parts"])
    assert not [text for text in held if f": {text}." in written]


def test_an_alias_of_another_concept_is_no_drawing():
    styles = {
        row["name"]: row["styles"]
        for row in map(json.loads, (DATA / "concepts.jsonl").read_text(encoding="utf8").splitlines())
    }
    assert (
        "emojitwo" in styles["cricket game"]
        and "emojitwo" not in styles["cricket"]
        and "noto-v1" not in styles["cricket"]
    )


def test_sizes():
    size = lambda folder: (
        sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts) / 1e6
    )
    assert size(DATA) <= 15, f"data/ is {size(DATA):.1f} MB"


def test_every_source_is_attributed_and_licensed():
    text = (DATA / "ATTRIBUTION.md").read_text(encoding="utf8")
    for package, version in PACKAGES.items():
        assert package in text and version in text, f"{package} {version} is not in ATTRIBUTION.md"
    for licence in ("CC BY 4.0", "CC BY-SA 4.0", "Apache", "MIT", "Unicode", "WordNet"):
        assert licence in text, f"ATTRIBUTION.md does not name {licence}"
    licences = {path.stem: path.read_text(encoding="utf8", errors="replace") for path in (DATA / "licenses").iterdir()}
    for package in PACKAGES:
        assert any(package.lstrip("@").replace("/", "-") == stem for stem in licences), (
            f"data/licenses has no text for {package}"
        )
    assert all(len(text) > 300 for text in licences.values())
    assert not any("GNU GENERAL PUBLIC LICENSE" in text.upper() for text in licences.values())


def test_share_alike_pictures_stand_alone(world):
    """OpenMoji is CC BY-SA: its pictures are in a file of their own."""
    with zipfile.ZipFile(DATA / "pictures" / "openmoji.zip") as archive:
        assert {name.removesuffix(".png") for name in archive.namelist()} >= {c["key"] for c in world.concepts}
    assert "CC BY-SA 4.0" in (DATA / "ATTRIBUTION.md").read_text(encoding="utf8")


# ---------------------------------------------------------------- the splits

def test_splits_follow_from_the_seed(world, pixels):
    found = make_splits(
        world.concepts,
        {(c["key"], s): pixels[c["key"], s] for c in world.concepts for s in c["styles"]},
        SPLITS["seed"],
    )
    assert json.loads(json.dumps(found)) == SPLITS, "splits.json is not what the seed gives"


def test_splits_are_what_they_say(world):
    concepts, renderings, couples = (
        SPLITS["concepts"],
        [tuple(r) for r in SPLITS["renderings"]],
        [tuple(c) for c in SPLITS["scene_couples"]],
    )
    assert len(set(concepts)) == 40 and len(set(renderings)) == 150 and len({key for key, _ in renderings}) == 150
    assert not set(concepts) & {key for key, _ in renderings}
    assert {style for _, style in renderings} == set(STYLES) and HELD_OUT_STYLE not in STYLES
    keys = {c["key"]: c["name"] for c in world.concepts}
    assert set(concepts) <= keys.keys() and {key for key, _ in renderings} <= keys.keys()
    assert len(set(couples)) == len(couples) > 100 and all(a < b and {a, b} <= set(SCENE_NAMES) for a, b in couples)
    assert not {keys[key] for key in (*concepts, *(key for key, _ in renderings))} & set(SCENE_NAMES), (
        "scenes show their concepts in every style"
    )
    words = {
        key: set(re.findall(r"[a-z0-9]+", name))
        - {"with", "of", "and", "the", "a", "on", "in", "over", "without", "at", "face"}
        for key, name in keys.items()
    }
    for key in concepts:
        assert not any(words[key] & words[other] for other in keys if other != key), (
            f"{keys[key]} has a relative in training"
        )


def test_every_picture_is_in_one_split(world):
    rows = {
        split: [r for r in data.pairs(world, split) if r["task"] == "draw"]
        for split in ("train", "held_out_renderings", "held_out_concepts", "held_out_style")
    }
    found = {split: refs(rows[split]) for split in rows}
    assert [len(found[s]) for s in ("train", "held_out_renderings", "held_out_concepts")] == [
        821 * 4 - 150 - 160,
        150,
        160,
    ]
    assert len(set().union(*found.values())) == sum(map(len, found.values())), "a picture is in two splits"
    keys = lambda split: {ref.split("/")[1] for ref in found[split]}
    assert not keys("held_out_concepts") & keys("train") and keys("held_out_renderings") <= keys("train")
    assert {ref.split("/")[0] for ref in found["held_out_style"]} == {HELD_OUT_STYLE} and not keys(
        "held_out_style"
    ) & keys("held_out_concepts")


@pytest.mark.parametrize("kind", KINDS)
def test_training_documents_show_nothing_held_out(kind, train, world):
    concepts, renderings, couples = (
        set(SPLITS["concepts"]),
        {tuple(r) for r in SPLITS["renderings"]},
        {tuple(c) for c in SPLITS["scene_couples"]},
    )
    key_of = {c["name"]: c["key"] for c in world.concepts}
    shown = set()
    for ref in refs(train[kind]):
        if ref.startswith("scene:"):
            a, b, _, style, _ = ref.removeprefix("scene:").split("|")
            assert tuple(sorted((a, b))) not in couples, ref
            shown |= {(key_of[a], style), (key_of[b], style)}
        else:
            shown.add(tuple(ref.split("/"))[::-1])
    assert len(shown) > 100
    assert not {key for key, _ in shown} & concepts, "a held-out concept is shown"
    assert not shown & renderings, "a held-out rendering is shown"
    assert {style for _, style in shown} <= set(STYLES), "a held-out style is shown"


@pytest.mark.parametrize("kind", TALK)
def test_training_documents_name_nothing_held_out(kind, train, world):
    names = {c["key"]: c["name"] for c in world.concepts}
    held = {names[key] for key in SPLITS["concepts"]}
    wishes = {caption(names[key], style) for key, style in map(tuple, SPLITS["renderings"])}
    mention = re.compile(r"(?<![\w-])(" + "|".join(map(re.escape, sorted(held, key=len, reverse=True))) + r")(?![\w-])")
    for row in train[kind]:
        text = text_of(row)
        assert not mention.search(text), f"{text!r} names a held-out concept"
        assert not wishes & {text.strip(" :\n"), *re.findall(r"show me (.*?)\.\n", text)}, (
            f"{text!r} asks for a held-out rendering"
        )
        assert "EmojiTwo" not in text


@pytest.mark.parametrize("kind", ["scenes", "subjects", "dialogues"])
def test_training_documents_name_no_held_out_couple(kind, train):
    couples, seen = {tuple(c) for c in SPLITS["scene_couples"]}, 0
    word = {name: name for name in SCENE_NAMES} | {data.plural(name): name for name in SCENE_NAMES}
    for row in train[kind]:
        if any(part["picture"].startswith("scene:") for part in row["parts"]):
            named = tuple(sorted({word[w] for w in re.findall(r"[a-z]+", text_of(row)) if w in word}))
            assert len(named) in (1, 2) and named not in couples, text_of(row)
            seen += len(named) == 2
    assert seen > 1000


def test_held_out_scenes_are_of_held_out_couples(world):
    couples = {tuple(c) for c in SPLITS["scene_couples"]}
    held = scene_list(world, "held_out_renderings")
    assert not set(held) & set(scene_list(world, "train"))
    pairs_ = [s for s in held if s.relation in ("left", "above")]
    assert len(pairs_) >= 200 and all(tuple(sorted((s.a, s.b))) in couples for s in pairs_)
    assert {s.relation for s in held} == {"left", "above", "two", "three"} and {s.style for s in held} == set(STYLES)


def test_held_out_articles_are_of_other_classes(world, train):
    first = lambda rows: {re.sub(r" in \w+ style: ", ": ", row["parts"][0]["text"]) for row in rows}
    held = data.articles(world, "held_out_renderings")
    assert len(held) >= 30 and len(train["articles"]) >= 300 and not first(held) & first(train["articles"])
    for rows in (held, train["articles"]):
        assert not {tuple(ref.split("/"))[::-1] for ref in refs(rows)} & {tuple(r) for r in SPLITS["renderings"]}


def test_no_picture_is_on_both_sides(world, train, pixels):
    """Pixel by pixel: single drawings, the held-out style included."""
    mine = {
        pixels[tuple(ref.split("/"))[::-1]]
        for kind in KINDS
        for ref in refs(train[kind])
        if not ref.startswith("scene:")
    }
    assert len(mine) > 2500
    for split in ("held_out_renderings", "held_out_concepts", "held_out_style"):
        twins = [ref for ref in refs(data.pairs(world, split)) if pixels[tuple(ref.split("/"))[::-1]] in mine]
        assert not twins, f"{split}: {twins[:5]} are in training, pixel by pixel"


def test_no_scene_is_on_both_sides(world, train):
    mine = {world.picture(ref).tobytes() for ref in refs(train["scenes"])}
    theirs = {
        ref: world.picture(ref).tobytes()
        for ref in refs(data.scenes(world, "held_out_renderings")) | refs(data.dialogues(world, "held_out_renderings"))
        if ref.startswith("scene:")
    }
    twins = [ref for ref, value in theirs.items() if value in mine]
    assert len(theirs) >= 500 and not twins, (
        f"{len(twins)} held-out scenes are in training, pixel by pixel, such as {twins[:3]}"
    )


def test_the_data_does_not_depend_on_hash_order():
    code = (
        "import hashlib, json; from dreamllm_edu import data; w = data.World(); "
        "print(hashlib.sha256(json.dumps([getattr(data, k)(w, s) for k in data.KINDS for s in ('train', "
        "'held_out_renderings')]).encode()).hexdigest())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "77"},
    )
    world = data.World()
    here = hashlib.sha256(
        json.dumps([getattr(data, k)(world, s) for k in KINDS for s in ("train", "held_out_renderings")]).encode()
    ).hexdigest()
    assert run.stdout.strip() == here


# ---------------------------------------------------------------- truth of captions, scenes and answers

@pytest.mark.parametrize("split", ["train", "held_out_renderings"])
def test_captions_say_what_is_shown(split, world):
    names = {c["key"]: c["name"] for c in world.concepts}
    shown = {"twemoji": "Twemoji", "noto": "Noto", "openmoji": "OpenMoji", "fluent": "Fluent"}
    for row in data.pairs(world, split):
        text, ref = (row["parts"] if row["task"] == "draw" else row["parts"][::-1])
        style, key = ref["picture"].split("/")
        truth = f"{names[key]} in {shown[style]} style"
        assert text["text"] == (f"{truth}:" if row["task"] == "draw" else f" {truth}")
        assert row["given"] == 1 and (row["concept"], row["style"]) == (names[key], style)


def test_a_caption_of_the_held_out_style_does_not_name_it():
    assert caption("cat", HELD_OUT_STYLE) == "cat" and caption("cat", "noto") == "cat in Noto style"


def boxes_truth(scene, world):
    """The scene composed a second time, here, from the stored PNG files."""
    canvas = np.full((64, 64, 3), 255, np.uint8)
    names = {"two": [scene.a] * 2, "three": [scene.a] * 3}.get(scene.relation, [scene.a, scene.b])
    for name, (x, y, side) in zip(names, scene.boxes()):
        key = next(c["key"] for c in world.concepts if c["name"] == name)
        with zipfile.ZipFile(DATA / "pictures" / f"{scene.style}.zip") as archive:
            small = (
                Image.open(io.BytesIO(archive.read(f"{key}.png")))
                .convert("RGB")
                .resize((side, side), Image.Resampling.LANCZOS)
            )
        canvas[y:y + side, x:x + side] = np.asarray(small)
    return canvas


def test_scenes_show_what_they_say(world):
    for scene in scene_list(world, "train")[::150] + scene_list(world, "held_out_renderings")[::40]:
        assert np.array_equal(np.asarray(world.picture(scene.ref)), boxes_truth(scene, world)), scene
        assert Scene.from_ref(scene.ref) == scene


def test_geometry_of_every_scene(world):
    for scene in (*scene_list(world, "train"), *scene_list(world, "held_out_renderings")):
        boxes = scene.boxes()
        assert len(boxes) == {"three": 3}.get(scene.relation, 2) and (scene.a == scene.b) == (
            scene.relation in ("two", "three")
        )
        for i, (x, y, side) in enumerate(boxes):
            assert 0 <= x and 0 <= y and x + side <= 64 and y + side <= 64, "an object leaves the canvas"
            for u, v, other in boxes[:i]:
                assert x + side <= u or u + other <= x or y + side <= v or v + other <= y, "two objects overlap"
        (x, y, side), (u, v, _) = boxes[:2]
        assert scene.relation != "left" or x + side <= u and abs(y - v) < side / 2
        assert scene.relation != "above" or y + side <= v and abs(x - u) < side / 2


@pytest.mark.parametrize("split", ["train", "held_out_renderings"])
def test_answers_are_true_of_the_picture(split, world):
    names, answers = {c["key"]: c["name"] for c in world.concepts}, {}
    for row in data.dialogues(world, split):
        if row["task"] == "show":
            style, key = row["parts"][2]["picture"].split("/")
            assert row["parts"][0]["text"] == f"User: show me {names[key]} in {STYLES[style]} style.\nAssistant:"
            continue
        ref, question, answer = row["parts"][1]["picture"], row["parts"][2]["text"], row["parts"][3]["text"].strip()
        assert row["given"] == 3 and row["answer"].strip() == answer
        if row["task"] in ("what", "style"):
            style, key = ref.split("/")
            assert answer == (names[key] if row["task"] == "what" else STYLES[style])
            continue
        scene = Scene.from_ref(ref)
        if row["task"] == "count":
            assert (
                answer == {2: "two", 3: "three"}[len(scene.boxes())] and f"how many {data.plural(scene.a)}?" in question
            )
        else:
            one, two = re.fullmatch(r" where is the (.+) from the (.+)\?\nAssistant:", question).groups()
            at = dict(zip((scene.a, scene.b), scene.boxes()))
            dx, dy = at[one][0] - at[two][0], at[one][1] - at[two][1]
            assert answer == (
                {True: "right", False: "left"}[dx > 0] if abs(dx) > abs(dy) else {True: "below", False: "above"}[dy > 0]
            )
        answers.setdefault(row["task"], Counter())[answer] += 1
    for count in answers.values():
        assert max(count.values()) < 2 * min(count.values()), f"one answer is usually right: {count}"


def test_scene_captions_edits_and_subjects(world):
    names = {c["key"]: c["name"] for c in world.concepts}
    for row in data.scenes(world, "train"):
        scene = Scene.from_ref(row["parts"][1]["picture"])
        body = {
            "left": rf"an? {scene.a} to the left of an? {scene.b}",
            "above": rf"an? {scene.a} above an? {scene.b}",
            "two": rf"two {data.plural(scene.a)}",
            "three": rf"three {data.plural(scene.a)}",
        }
        assert re.fullmatch(rf"{body[scene.relation]} in {STYLES[scene.style]} style:", row["parts"][0]["text"])
    for row in data.edits(world, "train") + data.edits(world, "held_out_renderings"):
        (source, key), (target, same) = (row["parts"][i]["picture"].split("/") for i in (1, 4))
        assert key == same and source != target and world.split_of(key, source) == "train"
        assert (
            f"draw this in {STYLES[target]} style" in row["parts"][2]["text"]
            and row["parts"][3]["text"] == f" {names[key]} in {STYLES[target]} style:"
        )
    for row in data.subjects(world, "train")[::20]:
        scene = Scene.from_ref(row["parts"][4]["picture"])
        style, key = row["parts"][1]["picture"].split("/")
        assert (style, names[key]) == (scene.style, scene.a) and f" {scene.phrase}:" == row["parts"][3]["text"]


def test_plurals_and_articles():
    assert [data.plural(n) for n in ("cat", "bus", "butterfly", "tomato", "key")] == [
        "cats",
        "buses",
        "butterflies",
        "tomatoes",
        "keys",
    ]
    assert data.article("owl") == "an owl" and data.article("cat") == "a cat"
    assert len(set(SCENE_NAMES)) == len(SCENE_NAMES) == len({data.plural(n) for n in SCENE_NAMES})


# ---------------------------------------------------------------- loading

@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_loads_and_yields_documents(kind, world, processor):
    for split in ("train", "held_out_renderings"):
        found = load(kind, split, world)
        assert len(found) == len(getattr(data, kind)(world, split)) > 20 and set(found["kind"]) == {kind}
        for row in found.select(range(0, len(found), len(found) // 4)):
            document = to_document(row, world)
            assert (
                isinstance(document, Document)
                and document.pictures
                and document.texts
                and 0 < document.given < len(document)
            )
            assert all(p.size == (64, 64) and p.mode == "RGB" for p in document.pictures)
            batch = processor(document)
            assert (batch["labels"] != -100).any(), "a training document must teach something"


def test_load_says_what_there_is(world):
    with pytest.raises(ValueError, match="'poems'.*pairs.*scenes"):
        load("poems", world=world)
    for kind in KINDS:
        with pytest.raises(ValueError, match=f"{kind}.*'trian'"):
            load(kind, "trian", world)
    for kind in set(KINDS) - {"pairs"}:
        with pytest.raises(ValueError, match="held_out_style"):
            load(kind, "held_out_style", world)
    assert len(load("pairs", "held_out_style", world)) > 1000


def test_smileys_are_there_for_those_who_ask():
    assert len(data.World(groups=None).concepts) == 981


@pytest.mark.parametrize("module", ["dreamllm_edu.documents", "dreamllm_edu.data", "dreamllm_edu.data.lanes"])
def test_documents_and_data_load_fast(module):
    """Libraries that take seconds to load are loaded by the functions that need them."""
    slow = ("datasets", "pandas", "pyarrow", "transformers", "diffusers", "matplotlib")
    code = f"import sys, {module}; print([name for name in {slow!r} if name in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert run.stdout.strip() == "[]"


# ---------------------------------------------------------------- processes and threads

WORLD_REFS = ["noto/1f989", "twemoji/1f34e", "openmoji/1f989", "fluent/1f34e", "scene:cat|dog|left|noto|0"] * 20


def wrong_pictures(world, expected):
    """How many pictures are not those of `expected`; an error counts, too."""
    wrong = 0
    for ref, pixels in zip(WORLD_REFS, expected, strict=True):
        try:
            wrong += world.picture(ref).tobytes() != pixels
        except Exception:
            wrong += 1
    return wrong


@pytest.mark.parametrize("method", [m for m in ("fork", "spawn") if m in multiprocessing.get_all_start_methods()])
def test_workers_read_a_world_that_was_used_before_they_began(method):
    world = World()
    expected = [world.picture(ref).tobytes() for ref in WORLD_REFS]
    with ProcessPoolExecutor(3, mp_context=multiprocessing.get_context(method)) as pool:
        jobs = [pool.submit(wrong_pictures, world, expected) for _ in range(3)]
        assert wrong_pictures(world, expected) == 0 and [job.result(120) for job in jobs] == [0, 0, 0]


def test_a_world_is_copied_pickled_and_shared_by_threads(tmp_path, monkeypatch):
    world = World()
    expected = [world.picture(ref).tobytes() for ref in WORLD_REFS]
    for other in (copy.deepcopy(world), pickle.loads(pickle.dumps(world))):
        assert wrong_pictures(other, expected) == 0 and other.held_concepts == world.held_concepts
    assert len(pickle.dumps(world)) < 2**20, "the pictures need not travel"
    with ThreadPoolExecutor(4) as pool:
        fresh = World()
        assert sum(pool.map(lambda _: wrong_pictures(fresh, expected), range(4))) == 0
    shutil.copytree(DATA, tmp_path / "data", ignore=shutil.ignore_patterns("*.xz"))
    monkeypatch.chdir(tmp_path)
    moved = World("data")
    monkeypatch.chdir("/")
    assert wrong_pictures(moved, expected) == 0, "its folder is the one where it was made"
    with pytest.raises(KeyError):
        world.png("no such key", "noto")
