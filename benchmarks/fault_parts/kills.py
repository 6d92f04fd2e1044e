"""`kill -9` at random moments: does the same command end with the same weights, bit by bit?

`train` and `pretrain` run as processes of their own, with few steps and a checkpoint after each or each second. One
run is left alone. Then runs are killed: at a random moment of the start-up, of the steps, or as soon as a save has
begun (a `.part` is there), by turns. After each kill the same command is started again in the same folder, and
killed again or left to finish; every third is left. A kill holds if the run that follows from it ends with the files
of the run that was left alone: weights, last checkpoint, losses of every step. A third line kills a small training,
which saves after every step, many more times: most hit a save."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from . import ROOT, in_fork, row

TRAIN = [
    "-m",
    "dreamllm_edu.train",
    "--stage",
    "1",
    "--steps",
    "6",
    "--batch",
    "8",
    "--lanes",
    "4",
    "--save-every",
    "1",
    "--precision",
    "no",
    "--no-store",
    "--trackers",
]
# `pretrain` has no option for it: a checkpoint after each second step instead of each 500th
PRETRAIN = [
    "-c",
    "import functools, sys; from dreamllm_edu import pretraining as p; from dreamllm_edu.app.cli import main; "
    "p.train_part = functools.partial(p.train_part, save_every=2); sys.exit(main())",
    "pretrain",
    "language",
    "--steps",
    "8",
]


def start(words: list[str], cwd: Path) -> subprocess.Popen:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=cwd,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def train_words(out: Path) -> list[str]:
    return [*TRAIN, "--out", str(out)]


def pretrain_words(out: Path) -> list[str]:
    return [*PRETRAIN, "--out", str(out / "parts"), "--runs", str(out / "runs")]


def prepare_pretrain(out: Path) -> None:
    """The tokenizer, which the language model needs."""
    import shutil

    from dreamllm_edu.files import WEIGHTS

    shutil.copytree(WEIGHTS / "mini" / "tokenizer", out / "parts" / "tokenizer")


def losses(out: Path) -> list[dict]:
    """The rows of the logs that follow from the training alone: no seconds, no memory."""
    rows = []
    for log in sorted(out.rglob("log.jsonl")):
        for line in log.read_text().splitlines():
            try:
                made = json.loads(line)
            except ValueError:  # the kill cut the line off
                continue
            timed = ("seconds", "samples_per_second", "tokens_per_second", "memory_mb")
            rows.append({"log": str(log.relative_to(out)), **{k: v for k, v in made.items() if k not in timed}})
    return rows


def end_of(out: Path) -> tuple:
    """What has to be equal: all weights and checkpoints, and the losses."""
    tensors = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*.safetensors")}
    return tensors, losses(out)


def difference(end: tuple, whole: tuple) -> str | None:
    names = sorted(whole[0].keys() ^ end[0].keys()) or [n for n in whole[0] if whole[0][n] != end[0][n]]
    if names:
        return f"{names[0]} is another"
    return None if end[1] == whole[1] else "the losses are others"


def wait_for(process: subprocess.Popen, out: Path, moment: str, dice: random.Random, seconds: float) -> None:
    """Return at the moment of the kill, or when the process has ended."""
    until, lines = time.monotonic() + 300, dice.randint(1, 5)
    if moment == "start-up":
        until = time.monotonic() + dice.uniform(0, seconds)
    elif moment == "saving":  # the next save after some number of steps
        while process.poll() is None and len(losses(out)) < lines and time.monotonic() < until:
            time.sleep(0.01)
        while process.poll() is None and time.monotonic() < until and not half_saved(out):
            time.sleep(0.0005)
        until = time.monotonic() + dice.uniform(0, 0.02)
    else:
        while process.poll() is None and len(losses(out)) < lines and time.monotonic() < until:
            time.sleep(0.01)
        until = time.monotonic() + dice.uniform(0, seconds / 8)
    while process.poll() is None and time.monotonic() < until:
        time.sleep(min(0.01, max(0, until - time.monotonic())))


def half_saved(out: Path) -> bool:
    """Whether a save has begun and not ended."""
    return any(out.rglob(".step-*.part")) or any(out.rglob("*.part"))


def kill(process: subprocess.Popen) -> bool:
    """SIGKILL to the process and its children; False if it had ended by itself."""
    alive = process.poll() is None
    if alive:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return alive


def killed_runs(words: Callable, folder: Path, prepare: Callable, kills: int, dice: random.Random) -> Iterator[tuple]:
    """For each chain of kills and the run that is left to finish: (moments, saves that were cut off, what is wrong)."""
    whole = folder / "whole"
    whole.mkdir(parents=True)
    prepare(whole)
    began = time.monotonic()
    process = start(words(whole), folder)
    error = process.communicate()[1]
    if process.returncode:
        raise RuntimeError(f"the run that is left alone fails: {error[-500:]}")
    seconds, expected, number, done = time.monotonic() - began, end_of(whole), 0, 0
    moments = ["start-up", "steps", "saving", "saving", "steps"]
    while done < kills:
        out, chain, cut = folder / f"run-{number}", [], 0
        out.mkdir()
        prepare(out)
        for _ in range(min(3, kills - done)):
            moment = moments[done % len(moments)]
            process = start(words(out), folder)
            wait_for(process, out, moment, dice, seconds * 0.6)
            if kill(process):
                chain.append(moment)
                cut += half_saved(out)
                done += 1
            else:
                break  # it was done before: the next chain begins
        process = start(words(out), folder)
        try:
            error = process.communicate(timeout=300)[1]
            wrong = f"status {process.returncode}: {error.strip()[-200:]}" if process.returncode else None
        except subprocess.TimeoutExpired:
            kill(process)
            wrong = "hangs"
        wrong = wrong or difference(end_of(out), expected)
        number += 1
        yield chain, cut, wrong and f"killed {len(chain)} times ({', '.join(chain)}): {wrong}"


def command_row(name: str, words: Callable, prepare: Callable, folder: Path, kills: int, dice: random.Random) -> dict:
    tried, cut, runs, misses = 0, 0, 0, []
    for chain, half, wrong in killed_runs(words, folder, prepare, kills, dice):
        tried, cut, runs = tried + len(chain), cut + half, runs + 1
        misses += [wrong] * len(chain) if wrong else []
    return row(
        f"kill -9 of {name}: continued to the same bits",
        tried,
        misses,
        f"{runs} runs, killed up to three times each; {cut} kills cut a save off",
    )


def small_training(folder: Path) -> str:
    """A network of 800,000 weights, twelve steps, a checkpoint of 13 MB after each."""
    from dreamllm_edu.training.trainer import train_part

    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(400, 1000), torch.nn.Tanh(), torch.nn.Linear(1000, 400))
    loss = lambda m, s, g: {"loss": m(torch.randn(2, 400, generator=g)).square().mean()}
    train_part(
        network, loss, 12, 1e-3, folder=folder, warmup=1, ema_decay=0.9, precision="no", save_every=1, progress=False
    )
    return "done"


def small_row(folder: Path, kills: int, dice: random.Random) -> dict:
    """The same with forked processes, which start at once: uniformly random moments."""
    import dreamllm_edu.training.trainer  # noqa: F401  loaded before the forks

    folder.mkdir()
    began = time.monotonic()
    end = in_fork(lambda: small_training(folder / "whole"))
    if end != "done":
        raise RuntimeError(f"the run that is left alone fails: {end}")
    seconds, expected = time.monotonic() - began, end_of(folder / "whole")
    misses, cut, done, number = [], 0, 0, 0
    while done < kills:
        out = folder / f"run-{number}"
        number += 1
        hits = 0
        for _ in range(min(4, kills - done)):
            if in_fork(lambda out=out: small_training(out), timeout=dice.uniform(0, seconds * 0.9)) == "TIMEOUT":
                hits += 1
                cut += out.exists() and half_saved(out)
        end = in_fork(lambda out=out: small_training(out))
        wrong = None if end == "done" else end
        wrong = wrong or difference(end_of(out), expected)
        misses += [f"run {number}, killed {hits} times: {wrong}"] * hits if wrong else []
        done += hits
    return row(
        "kill -9 of a small training that saves after every step: continued to the same bits",
        done,
        misses,
        f"{cut} kills cut a save off",
    )


def run(folder: Path, quick: bool, seed: int) -> list[dict]:
    torch.set_num_threads(1)
    dice, kills = random.Random(seed), 2 if quick else 20
    rows = [small_row(folder / "small", 20 if quick else 200, dice)]
    jobs = {"train": (train_words, lambda out: None), "pretrain": (pretrain_words, prepare_pretrain)}
    for name, (words, prepare) in jobs.items():
        rows.append(command_row(name, words, prepare, folder / name, kills, dice))
    return rows
