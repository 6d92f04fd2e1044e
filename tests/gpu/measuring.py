"""What a check gets, and what it leaves: rows of measured values."""

import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch


class Skip(Exception):
    """A check that cannot run here; the message says why."""


class OutOfTime(Exception):
    """A check took longer than its bound."""


@dataclass
class Row:
    """One measured value. `status`: pass, fail, skipped, or measured (a value without a tolerance)."""

    what: str
    value: float | None
    unit: str
    tolerance: str
    status: str
    reason: str = ""


@dataclass
class Outcome:
    name: str
    status: str = "pass"
    reason: str = ""
    seconds: float = 0.0
    rows: list[Row] = field(default_factory=list)


class Context:
    """What a check gets: the device, whether it is a GPU, a folder, and methods that note results."""

    def __init__(self, device: torch.device, folder: Path, outcome: Outcome):
        self.device, self.folder, self.outcome = device, folder, outcome
        self.gpu = device.type == "cuda"

    def at_most(self, what: str, value: float, limit: float, unit: str = "") -> None:
        """Passes if `value` is a number of at most `limit`."""
        good = math.isfinite(value) and value <= limit
        self._row(what, value, unit, f"<= {limit:g}", "pass" if good else "fail")

    def at_least(self, what: str, value: float, limit: float, unit: str = "") -> None:
        good = math.isfinite(value) and value >= limit
        self._row(what, value, unit, f">= {limit:g}", "pass" if good else "fail")

    def within(self, what: str, value: float, low: float, high: float, unit: str = "") -> None:
        good = low <= value <= high
        self._row(what, value, unit, f"{low:g} to {high:g}", "pass" if good else "fail")

    def measured(self, what: str, value: float, unit: str = "", note: str = "") -> None:
        self._row(what, value, unit, "", "measured", note)

    def skip(self, what: str, reason: str) -> None:
        self._row(what, None, "", "", "skipped", reason)

    def _row(self, what, value, unit, tolerance, status, reason=""):
        value = None if value is None or not math.isfinite(value) else float(f"{value:.6g}")
        reason = reason or ("not finite" if value is None and status == "fail" else "")
        self.outcome.rows.append(Row(what, value, unit, tolerance, status, reason))

    def sync(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()

    def seconds(self, call, steps: int = 10, warmup: int = 3) -> float:
        """The median time of `call`, after a warm-up, with the GPU's queue empty before and after each."""
        times = []
        for i in range(warmup + steps):
            self.sync()
            began = time.perf_counter()
            call()
            self.sync()
            times += [time.perf_counter() - began] if i >= warmup else []
        return sorted(times)[len(times) // 2]
