"""What the GPU check needs, in one file, for a machine without network.

    python tests/gpu/bundle.py --out _gpu/bundle.tar.gz
    python tests/gpu/bundle.py --without-weights --wheels FOLDER

Prints every path with its size. Without the miniature's weights the checks of texts and pictures run with random ones.
`--wheels`: a folder with wheels of packages that the machine lacks. There: unpack, install the wheels, `make gpu`."""

import argparse
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PATHS = ("Makefile", "dreamllm_edu", "recipes", "tests/gpu")
WEIGHTS = ("clip", "dreamllm", "language", "scheduler", "tokenizer", "unet", "vae")  # not the judge


def needed(weights: bool) -> list[Path]:
    """The files, relative to the top of the tree."""
    found = []
    for path in (ROOT / name for name in PATHS):
        found += [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    relative = [p.relative_to(ROOT) for p in found if "__pycache__" not in p.parts]
    mini = Path("dreamllm_edu/weights/mini")
    keep = lambda p: mini not in p.parents or weights and p.relative_to(mini).parts[0] in WEIGHTS
    return [p for p in relative if keep(p)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("_gpu/bundle.tar.gz"))
    parser.add_argument("--without-weights", action="store_true")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels that go along, under wheels/")
    args = parser.parse_args()
    files = [(ROOT / path, path) for path in needed(not args.without_weights)]
    files += [(path, Path("wheels", path.name)) for path in sorted(args.wheels.glob("*.whl"))] if args.wheels else []
    args.out.parent.mkdir(parents=True, exist_ok=True)
    sizes = {}
    with tarfile.open(args.out, "w:gz") as bundle:
        for path, name in files:
            bundle.add(path, str(name))
            group = "/".join(name.parts[:4] if "mini" in name.parts else name.parts[:1])
            sizes[group] = sizes.get(group, 0) + path.stat().st_size
    for group, size in sizes.items():
        print(f"{size / 2**20:8.2f} MiB  {group}")
    print(f"{sum(sizes.values()) / 2**20:8.2f} MiB  in {len(files)} files, packed {args.out.stat().st_size / 2**20:.2f}"
          f" MiB: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
