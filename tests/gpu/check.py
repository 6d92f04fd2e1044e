"""Does dreamllm_edu compute on a GPU what it computes on the CPU, and how fast?

    python tests/gpu/check.py --out _gpu
    python tests/gpu/check.py --only losses attention

Runs from a source tree, without network, notebooks, data or pytest. Without a GPU it says so and runs the same checks
on the CPU, with miniature sizes. It writes OUT/gpu.json and OUT/gpu.md: device, versions, and for every check what was
measured, the tolerance, the result, and the seconds. A check that fails does not stop the others. Exit status: 0 if no
check failed and none was left out for lack of time, else 1."""

import argparse
import json
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

BEGAN = time.time()
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]
# Before torch starts: no network, reproducible matrix products, and a process group that needs no network card.
for name, value in {
    "HF_HUB_OFFLINE": "1",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NCCL_SOCKET_IFNAME": "lo",
    "GLOO_SOCKET_IFNAME": "lo",
    "TOKENIZERS_PARALLELISM": "false",
}.items():
    os.environ.setdefault(name, value)
warnings.filterwarnings("ignore")

import torch  # noqa: E402
from measuring import Context, Outcome, OutOfTime, Skip  # noqa: E402

BOUND = 360  # seconds for everything
PACKAGES = "torch transformers diffusers accelerate safetensors tokenizers numpy pillow triton".split()


def ring(*_):
    raise OutOfTime("longer than its bound")


def run_check(name: str, check, device: torch.device, bound: float) -> Outcome:
    """The outcome of one check, whatever it raises."""
    outcome, began = Outcome(name), time.time()
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, bound)
    try:
        with tempfile.TemporaryDirectory() as folder:
            check(Context(device, Path(folder), outcome))
    except Skip as reason:
        outcome.status, outcome.reason = "skipped", str(reason)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        message = " ".join(str(error).split())[:300]
        outcome.status, outcome.reason = "fail", f"{type(error).__name__}: {message} ({where})"
    finally:
        if hasattr(signal, "SIGALRM"):
            signal.setitimer(signal.ITIMER_REAL, 0)
    if outcome.status == "pass" and any(row.status == "fail" for row in outcome.rows):
        outcome.status = "fail"
    outcome.seconds = round(time.time() - began, 1)
    if device.type == "cuda":  # a check leaves no memory to the next one
        torch.cuda.empty_cache()
    return outcome


def versions() -> dict[str, str]:
    installed = {"python": sys.version.split()[0], "cuda": torch.version.cuda or "none"}
    for package in PACKAGES:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            installed[package] = "not installed"
    if torch.backends.cudnn.is_available():
        installed["cudnn"] = str(torch.backends.cudnn.version())
    return installed


class Report:
    """What was found so far; written after every check, so that a process that is killed leaves it."""

    def __init__(self, out: Path, device: torch.device, bound: float, names: list[str]):
        from speed import CONVENTION

        gpu = device.type == "cuda"
        self.out, self.lock, self.waiting = out, threading.RLock(), list(names)
        self.data = {
            "mode": "gpu" if gpu else "cpu",
            "device": torch.cuda.get_device_name() if gpu else "CPU",
            "versions": versions(),
            "bound_seconds": bound,
            "seconds": 0.0,
            "flop_convention": CONVENTION,
            "status": "pass",
            "left_out": [],
            "checks": [],
        }
        if gpu:
            free, total = torch.cuda.mem_get_info()
            self.data["gpu_memory_bytes"] = total
            self.data["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
        out.mkdir(parents=True, exist_ok=True)

    def add(self, outcome: Outcome) -> None:
        with self.lock:
            self.waiting.remove(outcome.name)
            self.data["checks"].append(asdict(outcome))
            self.write()

    def leave_out(self, name: str, reason: str) -> None:
        with self.lock:
            self.waiting.remove(name)
            self.data["left_out"].append({"name": name, "reason": reason})
            self.write()
        print(f"left out {name:16} {reason}", flush=True)

    def write(self) -> None:
        with self.lock:
            bad = self.data["left_out"] or any(check["status"] == "fail" for check in self.data["checks"])
            self.data["status"] = "fail" if bad else "pass"
            self.data["seconds"] = round(time.time() - BEGAN, 1)
            (self.out / "gpu.json").write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf8")
            (self.out / "gpu.md").write_text(table(self.data), encoding="utf8")


def cell(row: dict) -> str:
    return "" if row["value"] is None else f"{row['value']:.4g} {row['unit']}".strip()


def table(data: dict) -> str:
    """The report in Markdown, one line a value."""
    about = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    lines = [
        f"# GPU check on {data['device']}",
        "",
        "No GPU was found: these are the same checks on the CPU, with miniature sizes.\n" * (data["mode"] == "cpu"),
        f"{about}; {data['seconds']:.0f} s of at most {data['bound_seconds']:.0f} s: **{data['status']}**",
        "",
        "| check | what | measured | tolerance | result | s |",
        "|---|---|---|---|---|---|",
    ]
    plain = lambda text: text.replace("|", "\\|")
    for check in data["checks"]:
        rows = check["rows"]
        if not rows or check["reason"]:
            result = check["status"] + f": {check['reason']}" * bool(check["reason"])
            lines.append(f"| {check['name']} | | | | {plain(result)} | {check['seconds']} |")
        for i, row in enumerate(rows):
            name, seconds = ("", "") if i or check["reason"] else (check["name"], check["seconds"])
            result = row["status"] + f": {row['reason']}" * bool(row["reason"])
            what, result = plain(row["what"]), plain(result)
            lines.append(f"| {name} | {what} | {cell(row)} | {row['tolerance']} | {result} | {seconds} |")
    for left in data["left_out"]:
        lines.append(f"| {left['name']} | | | | left out: {left['reason']} | |")
    return "\n".join([*lines, "", f"MFU: {data['flop_convention']}", ""])


def watch(report: Report, bound: float) -> None:
    """End the process when everything took too long, even inside a call that no signal interrupts."""

    def end() -> None:
        with report.lock:
            for name in list(report.waiting):
                report.leave_out(name, f"not done when the {bound:.0f} s of the whole were over")
            print(f"stopped after {bound:.0f} s; see {report.out / 'gpu.md'}", file=sys.stderr, flush=True)
            os._exit(1)

    timer = threading.Timer(max(0.0, BEGAN + bound - time.time()), end)
    timer.daemon = True
    timer.start()


def run_all(checks: dict, device: torch.device, report: Report, bound: float) -> None:
    """Every check that waits and for which time is left, one after the other. Without a GPU each may take three times
    as long: other programs may use the processor."""
    for name in list(report.waiting):
        check, limit = checks[name]
        limit, left = limit * (1 if device.type == "cuda" else 3), BEGAN + bound - 10 - time.time()
        if left < 10:
            report.leave_out(name, f"{max(left, 0):.0f} s were left")
            continue
        outcome = run_check(name, check, device, min(limit, left))
        report.add(outcome)
        print(f"{outcome.status:8} {name:16}{outcome.seconds:6.1f} s  {outcome.reason}", flush=True)
        for row in outcome.rows:
            if row.status == "fail":
                print(f"        {row.what}: {row.value} {row.unit}, tolerance {row.tolerance} {row.reason}")


def main(argv: list[str] | None = None) -> int:
    import correctness
    import speed

    from dreamllm_edu.parts.loading import quiet

    checks = {**correctness.CHECKS, **speed.CHECKS}  # name -> (function, seconds it may take)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("_gpu"), help="folder of gpu.json and gpu.md")
    parser.add_argument("--only", nargs="+", choices=checks, metavar="NAME", help=f"of {', '.join(checks)}")
    parser.add_argument("--bound", type=float, default=BOUND, help="seconds for everything")
    parser.add_argument("--cpu", action="store_true", help="the CPU's checks, although there is a GPU")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
    # In float32 a GPU computes as the CPU does only without TF32, which PyTorch allows convolutions by default.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    report = Report(args.out, device, args.bound, [name for name in checks if name in (args.only or checks)])
    print(report.data["device"] if device.type == "cuda" else "no GPU: the same checks on the CPU, miniature sizes")
    watch(report, args.bound)
    with quiet():
        run_all(checks, device, report, args.bound)
    report.write()
    print(f"{report.data['status']} after {report.data['seconds']} s; see {args.out / 'gpu.md'}")
    return int(report.data["status"] != "pass")


if __name__ == "__main__":
    sys.exit(main())
