"""Wrap the statements that are longer than a line may be, as `ruff format` does, and leave all others as they are.

    python tools/long_lines.py tests/test_data.py     # these files
    python tools/long_lines.py                        # all of tests, tools and benchmarks

What a file means stays the same; this is checked. Long strings and comments stay too long: break them by hand."""
import ast
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUFF = [str(Path(sys.executable).with_name("ruff"))]


def too_long(path: Path) -> list[int]:
    """The numbers of the lines that are too long, from 1."""
    command = [*RUFF, "check", "--select", "E501", "--output-format", "json", str(path)]
    report = subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout
    return [item["location"]["row"] for item in json.loads(report)]


def wrap(path: Path) -> int:
    """Wrap one file's long statements; returns how many long lines are left."""
    before, tried = ast.dump(ast.parse(path.read_text(encoding="utf8"))), set()
    while True:
        lines = path.read_text(encoding="utf8").splitlines()
        rows = [row for row in too_long(path) if lines[row - 1] not in tried]
        if not rows:
            break
        for row in reversed(rows):  # from the end, so that the numbers of the others stay right
            tried.add(lines[row - 1])
            subprocess.run([*RUFF, "format", "--quiet", f"--range={row}-{row + 1}", str(path)], check=True, cwd=ROOT)
    if ast.dump(ast.parse(path.read_text(encoding="utf8"))) != before:
        raise RuntimeError(f"{path}: wrapping changed what it means")
    return len(too_long(path))


if __name__ == "__main__":
    given = [Path(name).resolve() for name in sys.argv[1:]]
    for file in given or sorted(
        path for folder in ("tests", "tools", "benchmarks") for path in (ROOT / folder).glob("*.py")
    ):
        print(f"{file.name}: {wrap(file)} lines are still too long")
