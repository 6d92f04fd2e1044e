"""Does a document cost more in a larger corpus?

    python benchmarks/corpus_size.py

Writes JSONL corpora of 1e3, 1e4, 1e5 and 1e6 short dialogues, reads 20,000 documents of each through four lanes as
training does, encoded, and prints microseconds a
document and peak resident memory, each size in a process of its own. Small corpora are read several times over."""
import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIZES = (1_000, 10_000, 100_000, 1_000_000)


def write(path, n):
    with path.open("w") as file:
        for i in range(n):
            turns = [
                {"from": "human", "value": f"What is number {i}?"},
                {"from": "gpt", "value": f"Number {i} is the one after {i - 1}."},
            ]
            file.write(json.dumps({"id": str(i), "conversations": turns}) + "\n")


def measure(path, documents):
    """In a process of its own: (microseconds a document, resident MB)."""
    from dreamllm_edu.data.lanes import Lane
    from dreamllm_edu.data.readers import open_corpora
    from dreamllm_edu.models.dreamllm.weights import mini_processor
    from dreamllm_edu.parts.tokenizer import encode_text

    corpora = open_corpora({"talk": {"format": "llava", "shards": path.name, "weight": 1}}, path.parent)
    lanes, layout = [Lane(corpora, lane, 4) for lane in range(4)], mini_processor().layout
    layout.text_ids = lambda text: encode_text(
        layout.tokenizer, text
    )  # without its memory, from which a small corpus would profit
    for lane in lanes:
        next(lane)
    began = time.perf_counter()
    for i in range(documents):
        record = next(lanes[i % 4])
        layout.encode(record.parts, record.given, record.name)
    seconds = time.perf_counter() - began
    print(json.dumps([seconds / documents * 1e6, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return measure(args.one, args.documents)
    with tempfile.TemporaryDirectory() as folder:
        for n in SIZES:
            path = Path(folder) / f"{n}.jsonl"
            write(path, n)
            found = subprocess.run(
                [sys.executable, __file__, "--one", str(path), "--documents", str(args.documents)],
                capture_output=True,
                text=True,
                check=True,
            )
            cost, memory = json.loads(found.stdout.splitlines()[-1])
            print(f"{n:>9,} documents: {cost:6.0f} microseconds each, {memory:6.0f} MB", flush=True)
            path.unlink()


if __name__ == "__main__":
    main()
