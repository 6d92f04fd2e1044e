"""What happens when things go wrong: killed trainings, damaged pictures, fuzzed texts, hostile checkpoints, full disks,
eight threads at once.

    python benchmarks/faults.py --out .runs/faults                 # everything, about 20 minutes on two idle cores
    python benchmarks/faults.py --out .runs/faults --only threads  # one part
    python benchmarks/faults.py --out .runs/faults --quick         # a few cases of each part, about two minutes

Each part writes `OUT/NAME.json` when it is done; the same command skips parts that are there (`--again` repeats them)
and at the end writes `OUT/faults.json`, which the page "Robustness" of the documentation shows (there it is
`benchmarks/faults.json`). The status is 0 if everything held, 1 if something did not. Needs Linux or macOS."""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

PARTS = ("threads", "hostile", "disk", "pictures", "fuzz", "kills")  # each a module of `fault_parts`


def machine() -> dict:
    """What kind of machine this is; no name of it."""
    import torch
    import transformers

    names = [line.split(":", 1)[1].strip() for line in cpu_lines() if line.startswith("model name")]
    return {
        "system": platform.system(),
        "processor": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__,
    }


def cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def run_part(name: str, quick: bool, seed: int, scratch: Path | None) -> dict:
    """The rows of one part, with its seconds."""
    import importlib

    part = importlib.import_module(f"fault_parts.{name}")
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=scratch, ignore_cleanup_errors=True) as folder:
        rows = part.run(Path(folder), quick, seed)
    seconds = time.perf_counter() - began
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "rows": rows,
        "seconds": round(seconds),
        "load": load,
        "quick": quick,
        "seed": seed,
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
    }


def show(name: str, part: dict) -> int:
    """Print the rows of a part; how many cases did not hold."""
    print(f"{name}: {part['seconds']} s")
    for row in part["rows"]:
        print(f"  {row['held']:>6} of {row['tried']:<6} {row['what']}" + (f" ({row['note']})" if row["note"] else ""))
        for miss in row["misses"][:10]:
            print(f"         MISS {miss}")
    sys.stdout.flush()
    return sum(row["tried"] - row["held"] for row in part["rows"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the JSON files go")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="these parts")
    parser.add_argument("--quick", action="store_true", help="a few cases of each part")
    parser.add_argument("--again", action="store_true", help="also parts whose JSON is there")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is random")
    parser.add_argument("--scratch", type=Path, help="folder for temporary files (default: the system's)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    missed = 0
    for name in args.only:
        path = args.out / f"{name}.json"
        part = json.loads(path.read_text()) if path.exists() and not args.again else None
        if part is None or (part["quick"], part["seed"]) != (args.quick, args.seed):
            part = run_part(name, args.quick, args.seed, args.scratch)
            path.write_text(json.dumps(part, indent=1) + "\n")
        missed += show(name, part)
    parts = {name: args.out / f"{name}.json" for name in PARTS}
    made = {name: json.loads(path.read_text()) for name, path in parts.items() if path.exists()}
    (args.out / "faults.json").write_text(json.dumps(made, indent=1) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
