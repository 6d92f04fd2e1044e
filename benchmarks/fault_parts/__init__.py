"""The parts of `benchmarks/faults.py`. Each module has `run(folder, quick, seed)`, which returns rows (`row`)."""

import hashlib
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests"))  # the tiny models of the tests


def row(what: str, tried: int, misses: list[str], note: str = "") -> dict:
    """One line of the page: of `tried` cases all but the `misses` held."""
    return {"what": what, "tried": tried, "held": tried - len(misses), "note": note, "misses": misses}


def fingerprint(path: Path) -> dict[str, str]:
    """SHA-256 of every file at or below `path`, by relative name."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def in_fork(job: Callable[[], str], timeout: float = 60, memory: int | None = None) -> str:
    """What `job` returns, computed in a forked process: 'TIMEOUT' if it hangs, 'DIED n' if it is killed or crashes,
    'ERROR ...' for an exception. `memory`: bytes of address space that it may add."""
    inlet, outlet = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        try:
            os.close(inlet)
            os.setsid()
            null = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(null, stream)
            if memory:
                size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
                resource.setrlimit(resource.RLIMIT_AS, (size + memory, size + memory))
            try:
                said = job()
            except BaseException as error:  # also SystemExit: the parent judges
                said = f"ERROR {type(error).__name__}: {error}"
            os.write(outlet, said.encode("utf8", "replace")[:60_000])
        finally:
            os._exit(0)
    os.close(outlet)
    pieces, end = [], time.monotonic() + timeout
    while True:
        ready, _, _ = select.select([inlet], [], [], max(0, end - time.monotonic()))
        piece = os.read(inlet, 65_536) if ready else None
        if not piece:
            break
        pieces.append(piece)
    os.close(inlet)
    if piece is None:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return "TIMEOUT"
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    said = b"".join(pieces).decode("utf8", "replace")
    return said if said and status == 0 else f"DIED {status}"


@contextmanager
def file_limit(limit: int):
    """Within it no file of this process can grow beyond `limit` bytes: the system refuses the write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
