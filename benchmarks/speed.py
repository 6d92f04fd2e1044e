"""How fast is it, beside the official code, transformers and the bare networks?

    python benchmarks/speed.py [--official FOLDER --python INTERPRETER] [--pairs 15] [--threads 1 2] [--out FILE.json]

One model of 13 million parameters with random weights, saved in the official format and read by both. Every
measurement alternates with those that it is compared with, so that a busy machine slows all of them; printed is the
median of the paired ratios with its 95 % bootstrap interval. FOLDER: a clone of github.com/RunpeiDong/DreamLLM;
INTERPRETER: a Python with torch, transformers 4.35.2, diffusers 0.24.0 and what that code imports. Without them the
official columns are left out."""
import argparse
import contextlib
import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import CLIPVisionModel

from dreamllm_edu.documents.document import Document, Dream
from dreamllm_edu.models.dreamllm.family import DreamLLMFamily
from dreamllm_edu.models.dreamllm.model import DreamLLM
from dreamllm_edu.models.dreamllm.official import official_config
from dreamllm_edu.models.dreamllm.processor import DreamLLMProcessor
from dreamllm_edu.parts.loading import parts_folder, quiet
from dreamllm_edu.sequences import collate
from dreamllm_edu.training.batches import Item, pack_items
from dreamllm_edu.training.features import frozen_features
from dreamllm_edu.training.recipe import recipe_of

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
NEW_TOKENS = 128


# ------------------------------------------------------------------ the model and the work

def write_checkpoint(folder: Path) -> None:
    """The miniature's sizes with random weights, in the official format, with all that its config.json names."""
    sizes = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 5, "num_attention_heads": 6,
             "num_key_value_heads": 6, "vocab_size": 4096, "initializer_range": 0.02}
    shutil.copytree(GOLDEN / "checkpoint", folder, ignore=shutil.ignore_patterns("*.safetensors", "*.bin"))
    raw = {**json.loads((folder / "config.json").read_text(encoding="utf8")), **sizes}
    clip, queries, head = raw["plugins_init_kwargs"].values()
    for plugin in (clip, queries, head):
        plugin["embed_hidden_size"] = sizes["hidden_size"]
    clip["clip_vision_model_name_or_path"], head["diffusion_name_or_path"] = "clip", "sd"
    queries["num_dream_queries"], head["resolution"] = 8, 64
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf8")
    shipped = parts_folder(None)
    with quiet():
        CLIPVisionModel.from_pretrained(shipped / "clip", dtype=torch.float32).save_pretrained(folder / "clip")
    pictures = json.loads((GOLDEN / "tiny/clip/preprocessor_config.json").read_text(encoding="utf8"))
    pictures |= {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}
    (folder / "clip/preprocessor_config.json").write_text(json.dumps(pictures), encoding="utf8")
    for part in ("unet", "vae", "scheduler"):
        shutil.copytree(shipped / part, folder / "sd" / part)
    torch.manual_seed(0)
    with quiet():
        DreamLLM(official_config(folder)).save_official(folder)


def documents(layout, length: int = 220) -> list:
    """Four documents of some `length` tokens, each a text, a picture that is drawn and read, twice."""
    words, noise = np.random.default_rng(0), torch.Generator().manual_seed(0)
    rows = []
    for _ in range(4):
        picture, ids = layout.dream_block() + layout.image_block(), [layout.id["<s>"]]
        texts = words.integers(10, 350, (2, length // 2 - len(picture) - 1)).tolist()
        for text in texts:
            ids += text + picture
        row = layout.encode(["x"])
        row.input_ids, row.labels = ids, [-100 if i not in set(texts[0] + texts[1]) else i for i in ids]
        row.images = row.targets = [torch.randn(3, 64, 64, generator=noise).clamp(-1, 1) for _ in texts]
        rows.append(row)
    return rows


# ------------------------------------------------------------------ stopwatches

class Ours:
    """Every measured thing of this project, by name, in seconds."""

    def __init__(self, folder: Path, precision: str):
        with quiet():
            self.model = DreamLLM.from_official(folder)
            self.processor = DreamLLMProcessor.from_official(folder)
        self.family, self.precision = DreamLLMFamily(self.model, self.processor), precision
        self.optimizer = torch.optim.AdamW(
            [p for p in self.model.parameters() if p.requires_grad], lr=0.0, fused=True)
        rows, layout = documents(self.processor.layout), self.processor.layout
        pictures = torch.stack([picture for row in rows for picture in row.images])
        self.batch = {**collate(rows, layout.pad_token_id), "pixel_values": pictures, "target_pixel_values": pictures}
        objective = self.family.objective(recipe_of("mini").stages[1])
        self.items = []
        for i, row in enumerate(rows):
            pixels = torch.stack(row.images)
            stored = {role: encoder.encode(pixels) for role, encoder in self.family.encoders.items()}
            random = objective.random_inputs(len(row.targets), torch.Generator().manual_seed(i))
            self.items.append(Item(row, "benchmark", str(i), (0, i), random, stored))
        self.objective = objective
        prompt = "a red apple on a table"
        self.work = {
            "batch": {key: self.batch[key] for key in ("input_ids", "attention_mask", "labels")}
            | {"images": pictures, "images_dm": pictures},
            "prompt": [prompt], "noise": torch.randn(1, 8, 8, 8), "condition": torch.randn(2, 8, 192),
            "text": torch.tensor([[1, *layout.text_ids(prompt)]]), "new": NEW_TOKENS}
        self.prompt = prompt

    def update(self, gradients) -> float:
        """Gradients, clipping and AdamW, timed."""
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        began = time.perf_counter()
        gradients()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return time.perf_counter() - began

    def plain(self) -> float:
        """The step as one would first write it."""
        return self.update(lambda: self.model(**self.batch).loss.backward())

    def packed(self) -> float:
        """The step of the `Trainer`: packed, with stored features, in one pass."""
        from dreamllm_edu.training.trainer import fast_attention

        def gradients():
            layout = self.processor.layout
            batch = pack_items(self.items, layout, 512, self.objective.extra_rows(layout))
            attention = fast_attention("cpu", self.precision, batch.input_ids.shape[1])
            with attention, torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16"):
                losses, zero = self.objective.losses(
                    self.model, batch, frozen_features(self.family, batch, "cpu"))
                sum((self.objective.weights[kind] * x.float().mean() for kind, x in losses.items()), zero).backward()

        return self.update(gradients)

    def picture(self) -> float:
        self.model.eval()
        began = time.perf_counter()
        self.model.generate(Document([self.prompt, Dream()]), self.processor, max_new_tokens=0, num_inference_steps=20)
        return time.perf_counter() - began

    @torch.no_grad()
    def bare(self) -> float:
        """Twenty U-Net calls with guidance, and one of the VAE: what no sampler can save."""
        self.model.eval()
        x, condition = self.work["noise"], self.work["condition"]
        began = time.perf_counter()
        for t in range(999, 0, -50):
            self.model.unet(torch.cat([x, x]), t, encoder_hidden_states=condition)
        self.model.vae.decode(x)
        return time.perf_counter() - began

    def text(self, n: int) -> float:
        self.model.eval()
        began = time.perf_counter()
        answers = self.model.generate([Document([self.prompt])] * n, self.processor, max_new_tokens=NEW_TOKENS,
                                      max_pictures=0)
        seconds = time.perf_counter() - began
        assert all(len(a.parts) == 2 for a in answers)
        return seconds

    @torch.no_grad()
    def transformers(self, n: int) -> float:
        """The same tokens by transformers' own `generate` of the language model."""
        self.model.eval()
        ids = self.work["text"].expand(n, -1)
        began = time.perf_counter()
        self.model.language_model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
            max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)
        return time.perf_counter() - began


class Official:
    """The official code in a process of its own: asked for one measurement at a time."""

    def __init__(self, python: str, code: str, folder: Path, threads: int):
        worker = Path(__file__).with_name("official_worker.py").resolve()
        self.process = subprocess.Popen([python, worker, Path(code).resolve(), folder, str(threads)], cwd=folder,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.answer("ready")

    def answer(self, word: str) -> str:
        for line in self.process.stdout:
            if line.startswith(word):
                return line.split()[1]
        raise SystemExit("the official code stopped; its message stands above")

    def __call__(self, case: str) -> float:
        print(case, file=self.process.stdin, flush=True)
        return float(self.answer("seconds"))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


# ------------------------------------------------------------------ pairs and ratios

def measured(stopwatches: dict, pairs: int) -> dict[str, np.ndarray]:
    """Seconds [pairs] of every stopwatch, in turn; the first round is not counted."""
    found = {name: [] for name in stopwatches}
    for i in range(pairs + 1):
        order = list(stopwatches.items())
        for name, watch in order if i % 2 else order[::-1]:
            found[name].append(watch())
    return {name: np.array(seconds[1:]) for name, seconds in found.items()}


def ratio(slow: np.ndarray, fast: np.ndarray) -> dict[str, float]:
    """Median of the paired ratios, and its 95 % interval over resampled pairs."""
    quotients = slow / fast
    draws = np.random.default_rng(0).integers(len(quotients), size=(2000, len(quotients)))
    low, high = np.quantile(np.median(quotients[draws], 1), [0.025, 0.975])
    return {"value": round(float(np.median(quotients)), 3), "low": round(float(low), 3), "high": round(float(high), 3)}


def comparisons(ours: Ours, official: Official | None) -> dict:
    """For each row of the table: stopwatches, and which ratios (slow over fast) it shows."""
    there = (lambda case: {"official": lambda: official(case)}) if official else (lambda case: {})
    return {
        "stage-II step": ({**there("step"), "plain": ours.plain, "packed": ours.packed},
                          [("official", "plain"), ("official", "packed"), ("plain", "packed")]),
        "text to image, 20 steps": ({**there("picture"), "ours": ours.picture, "bare": ours.bare},
                                    [("official", "ours"), ("ours", "bare")]),
        **{f"greedy text, {n} at once": (
            {**there(f"text{n}"), "ours": lambda n=n: ours.text(n), "transformers": lambda n=n: ours.transformers(n)},
            [("official", "ours"), ("transformers", "ours")]) for n in (1, 8)},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", help="folder of the official code")
    parser.add_argument("--python", help="an interpreter that can import it")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--precision", choices=["no", "bf16"], default="no", help="of the packed step")
    parser.add_argument("--only", help="rows whose name holds this")
    parser.add_argument("--out", help="a JSON file for the figures")
    args = parser.parse_args()
    if bool(args.official) != bool(args.python):
        parser.error("--official and --python belong together")
    found = {
        "torch": torch.__version__,
        "pairs": args.pairs,
        "precision of the packed step": args.precision,
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        folder = Path(temporary) / "checkpoint"
        write_checkpoint(folder)
        ours = Ours(folder, args.precision)
        torch.save(ours.work, folder / "work.pt")
        for threads in args.threads:
            torch.set_num_threads(threads)
            official = args.official and Official(args.python, args.official, folder, threads)
            if official:
                stack.callback(official.close)
            for name, (watches, shown) in comparisons(ours, official).items():
                if args.only and args.only not in name:
                    continue
                seconds = measured(watches, args.pairs)
                row = {"what": name, "threads": threads,
                       "seconds": {key: round(float(np.median(x)), 4) for key, x in seconds.items()},
                       "ratios": {f"{slow} / {fast}": ratio(seconds[slow], seconds[fast])
                                  for slow, fast in shown if slow in seconds}}
                found["rows"].append(row)
                print(f"{name}, {threads} thread{'s' * (threads > 1)}: {row['seconds']}")
                for key, r in row["ratios"].items():
                    print(f"    {key:22} {r['value']:.2f} [{r['low']:.2f}, {r['high']:.2f}]", flush=True)
    if args.out:
        Path(args.out).write_text(json.dumps(found, indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
