"""Hostile checkpoints, tokenizers, corpora and training folders: does any code of theirs run, and is the error clear?

Every case is opened in a process of its own, which may add 3 GiB of memory and take two minutes. A payload that runs
leaves a file, the canary. An error is clear if it is a `ValueError` or an `OSError` (the command line prints both as
one line, without a traceback) whose message has at least three words."""

import io
import json
import pickle
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from . import fingerprint, in_fork, row


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def safetensors_bytes(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A file in safetensors' layout: length of the header, header, data; the length may be a lie."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def tensor_files(canary: Path) -> dict[str, bytes]:
    """Files that pretend to hold weights."""
    zipped = io.BytesIO()
    torch.save({"w": Payload(canary)}, zipped)
    long = b'{"w":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}"
    return {
        "a pickle": pickle.dumps(Payload(canary)),
        "torch.save with a payload": zipped.getvalue(),
        "a header of 2^63 bytes": safetensors_bytes({}, b"", 2**63),
        "a header longer than the file": safetensors_bytes({"w": entry([1], 0, 4)}, b"1234", 10**6),
        "overlapping tensors": safetensors_bytes({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, b"x" * 12),
        "a tensor behind the end of the file": safetensors_bytes({"w": entry([1000], 0, 4000)}, b"x" * 8),
        "a tensor of 2^62 numbers": safetensors_bytes({"w": entry([2**31, 2**31], 0, 2**64 - 1)}, b"x" * 8),
        "a tensor with a negative side": safetensors_bytes({"w": entry([-1, 4], 0, 16)}, b"x" * 16),
        "an unknown type of numbers": safetensors_bytes({"w": entry([1], 0, 4, "OBJ")}, b"x" * 4),
        "a header nested 100,000 deep": safetensors_bytes(long),
        "nothing": b"",
    }


def changed(path: Path, change: Callable[[dict], object]) -> None:
    """A JSON file after `change`, which changes the object or returns another."""
    made = json.loads(path.read_text())
    path.write_text(json.dumps(change(made) or made))


CODE = "from pathlib import Path\nPath({!r}).touch()\nclass Model: pass\nModel.from_pretrained = Model\n"


def plant_code(folder: Path, canary: Path) -> None:
    """Every configuration in the folder names a class in a file that lies there, and asks to be trusted."""
    (folder / "hostile.py").write_text(CODE.format(str(canary)))
    names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoProcessor", "AutoTokenizer", "AutoImageProcessor")
    auto = {name: "hostile.Model" for name in names} | {"AutoTokenizer": ["hostile.Model", "hostile.Model"]}
    for path in folder.glob("*config.json"):
        changed(
            path, lambda made: made.update(auto_map=auto, trust_remote_code=True, custom_pipelines={"x": "hostile"})
        )


ESCAPE = "{{{{ ().__class__.__base__.__subclasses__()|map(attribute='__init__') }}}}{{{{ cycler.__init__.__globals__.os.system('touch {}') }}}}"  # noqa: E501


class Cases:
    """All cases: `add(kind, name, job)`, where `job()` opens what is hostile and returns nothing, or raises."""

    def __init__(self, folder: Path):
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        from dreamllm_edu.models.dreamllm import DreamLLMProcessor
        from dreamllm_edu.parts.tokenizer import train_tokenizer

        from conftest import make_tiny

        self.folder, self.all, self.count = folder, [], 0
        self.canary, self.outside = folder / "canary", folder / "outside"
        self.fill_outside()
        self.model = make_tiny()
        images = CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
        tokenizer = train_tokenizer(["a red cat in Noto style:"] * 4, vocab_size=300)
        self.processor = DreamLLMProcessor(images, tokenizer, num_queries=4, num_patches=16, max_length=256)

    def fill_outside(self) -> None:
        """The folder that no case may change, as it was."""
        shutil.rmtree(self.outside, ignore_errors=True)
        self.outside.mkdir()
        (self.outside / "mine.txt").write_text("mine")

    def add(self, kind: str, name: str, job: Callable[[], object], refused: bool = True) -> None:
        self.all.append((kind, name, job, refused))

    def place(self) -> Path:
        """A new folder."""
        self.count += 1
        path = self.folder / f"case-{self.count}"
        path.mkdir()
        return path

    def checkpoint(self) -> Path:
        """A new folder with a whole model and processor."""
        from dreamllm_edu.parts.loading import quiet

        path = self.place()
        with quiet():
            self.model.save_pretrained(path)
            self.processor.save_pretrained(path)
        return path


def command(*words: object) -> Callable[[], object]:
    """A job that runs the command line; its status 1 is an error with a message in one line, as it should be."""

    def job():
        import contextlib

        from dreamllm_edu.app.cli import main

        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            code = main([str(word) for word in words])
        if code:
            raise ValueError(said.getvalue().strip().splitlines()[-1])

    return job


def weights(cases: Cases) -> None:
    """Weights that are pickles, or no safetensors, wherever weights are read."""
    from dreamllm_edu.files import read_tensors
    from dreamllm_edu.models.dreamllm import DreamLLM
    from dreamllm_edu.models.dreamllm.official import read_file
    from dreamllm_edu.models.dreamllm.weights import load_trained

    kind = "weights that are a pickle, or safetensors with a lying header"
    for name, data in tensor_files(cases.canary).items():
        folder = cases.checkpoint()
        (folder / "model.safetensors").write_bytes(data)
        cases.add(kind, f"model.safetensors: {name}", lambda folder=folder: DreamLLM.from_pretrained(folder))
        file = cases.place() / "trained.safetensors"
        file.write_bytes(data)
        cases.add(kind, f"read_tensors: {name}", lambda file=file: read_tensors(file))
        cases.add(kind, f"load_trained: {name}", lambda file=file: load_trained(cases.model, file))
        for ending in ("bin", "safetensors"):
            other = file.with_name(f"{cases.count}.{ending}")
            other.write_bytes(data)
            cases.add(kind, f"official .{ending}: {name}", lambda other=other: read_file(other))
    for name in ("a pickle", "torch.save with a payload"):
        folder = cases.checkpoint()
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(tensor_files(cases.canary)[name])
        cases.add(kind, f"pytorch_model.bin: {name}", lambda folder=folder: DreamLLM.from_pretrained(folder))
        document = folder / "a.md"
        document.write_text("a cat")
        cases.add(
            kind,
            f"generate --model, pytorch_model.bin: {name}",
            command("generate", document, "--model", folder, "--out", folder / "a.html"),
        )
    folder = cases.checkpoint()
    data = (folder / "model.safetensors").read_bytes()
    outside = cases.place() / "outside.safetensors"
    outside.write_bytes(data)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"w": f"../{outside.parent.name}/outside.safetensors"}})
    )
    cases.add(kind, "an index that leads out of the folder", lambda: DreamLLM.from_pretrained(folder), refused=False)


def remote_code(cases: Cases) -> None:
    """Configurations that name code."""
    from transformers import AutoTokenizer

    from dreamllm_edu.models.dreamllm import DreamLLM, DreamLLMProcessor
    from dreamllm_edu.models.dreamllm.family import DreamLLMFamily
    from dreamllm_edu.parts.tokenizer import read_tokenizer

    kind = "configurations that name code of their own (auto_map, trust_remote_code)"
    for name, load in {
        "model": DreamLLM.from_pretrained,
        "processor": DreamLLMProcessor.from_pretrained,
        "tokenizer": read_tokenizer,
        "language part, tokenizer": lambda folder: AutoTokenizer.from_pretrained(folder, local_files_only=True),
        "parts of a recipe": lambda folder: DreamLLMFamily.build(
            "paper", {"language": str(folder), "vision": str(folder), "diffusion": str(folder)}
        ),
    }.items():
        folder = cases.checkpoint()
        plant_code(folder, cases.canary)
        cases.add(kind, name, lambda folder=folder, load=load: load(folder), refused=name == "parts of a recipe")
    folder = cases.checkpoint()
    plant_code(folder, cases.canary)
    changed(folder / "tokenizer_config.json", lambda made: made.update(tokenizer_class="HostileTokenizer"))
    cases.add(kind, "tokenizer of an unknown class", lambda: DreamLLMProcessor.from_pretrained(folder), refused=False)
    other = cases.checkpoint()
    plant_code(other, cases.canary)
    changed(other / "config.json", lambda made: made.update(model_type="hostile"))
    cases.add(kind, "model of an unknown type", lambda: DreamLLM.from_pretrained(other))
    recipe = cases.place() / "recipe.yaml"
    recipe.write_text(f"stages: !!python/object/apply:os.system ['touch {cases.canary}']\n")
    cases.add(
        kind, "a recipe with a Python object", command("train", "--recipe", recipe, "--out", recipe.parent / "out")
    )


def bombs(cases: Cases) -> None:
    """Configurations whose sizes would fill the memory."""
    from dreamllm_edu.models.dreamllm import DreamLLM, DreamLLMProcessor

    kind = "configurations and tokenizers made to fill the memory or to hang"
    sizes = {
        "vocabulary of 10^12": lambda made: made["text_config"].update(vocab_size=10**12),
        "hidden size of 10^9": lambda made: made["text_config"].update(hidden_size=10**9),
        "a context of 10^12": lambda made: made["text_config"].update(max_position_embeddings=10**12),
        "10^9 queries": lambda made: made.update(num_queries=10**9),
        "U-Net of 10^9 channels": lambda made: made["unet_config"].update(block_out_channels=[10**9, 10**9]),
        "10^7 decoder layers": lambda made: made["text_config"].update(num_hidden_layers=10**7),
        "negative sizes": lambda made: made["text_config"].update(hidden_size=-32, num_attention_heads=-2),
        "a config that is a list": lambda made: [made],
        "sizes as text": lambda made: made["text_config"].update(hidden_size="32; import os"),
        "nulls for the parts": lambda made: made.update(text_config=None, unet_config=None),
    }
    for name, change in sizes.items():
        folder = cases.checkpoint()
        changed(folder / "config.json", change)
        # a longer context than the weights need changes no tensor: it may load
        cases.add(
            kind,
            f"config.json: {name}",
            lambda folder=folder: DreamLLM.from_pretrained(folder),
            refused="context" not in name,
        )
    deep = "[" * 100_000 + "]" * 100_000
    tokenizers = {
        "no JSON": lambda text: text[:100],
        "a list": lambda text: "[]",
        "deep": lambda text: deep,
        "numbers out of range": lambda text: text.replace('"id":1,', '"id":99999999999999999999,').replace(
            '"id": 1,', '"id": 99999999999999999999,'
        ),
        "unknown model": lambda text: text.replace('"BPE"', '"Exec"'),
        "without special tokens": lambda text: json.dumps({**json.loads(text), "added_tokens": []}),
    }
    for name, change in tokenizers.items():
        folder = cases.checkpoint()
        path = folder / "tokenizer.json"
        path.write_text(change(path.read_text()))
        cases.add(
            kind,
            f"tokenizer.json: {name}",
            lambda folder=folder: DreamLLMProcessor.from_pretrained(folder).layout,
            refused=name not in ("without special tokens",),
        )
    for file in ("config.json", "tokenizer_config.json", "processor_config.json"):
        folder = cases.checkpoint()
        (folder / file).write_text(deep)
        load = DreamLLM.from_pretrained if file == "config.json" else DreamLLMProcessor.from_pretrained
        cases.add(kind, f"{file} nested 100,000 deep", lambda folder=folder, load=load: load(folder))


def templates(cases: Cases) -> None:
    """Chat templates that reach for Python's classes, where somebody renders them."""
    from dreamllm_edu.models.dreamllm import DreamLLMProcessor

    kind = "chat templates that reach for Python's own classes"
    talk = [{"role": "user", "content": "hello"}]
    for name, place in (
        ("tokenizer", "tokenizer_config.json"),
        ("file", "chat_template.jinja"),
        ("processor", "processor_config.json"),
    ):
        folder, text = cases.checkpoint(), ESCAPE.format(cases.canary)
        if place.endswith(".jinja"):
            (folder / place).write_text(text)
        else:
            changed(folder / place, lambda made, text=text: made.update(chat_template=text))
        cases.add(
            kind,
            f"{name}: the processor's template",
            lambda folder=folder: DreamLLMProcessor.from_pretrained(folder).apply_chat_template(talk),
            refused=False,
        )

        def by_tokenizer(folder=folder):
            processor = DreamLLMProcessor.from_pretrained(folder)
            try:
                processor.tokenizer.apply_chat_template(talk, tokenize=False)
            except Exception as error:  # jinja's own error: the library's call, not ours
                raise ValueError(f"refused by transformers: {error}") from error

        cases.add(kind, f"{name}: rendered by the tokenizer", by_tokenizer, refused=False)


def archives(cases: Cases) -> None:
    """Shards whose names lead out of their folder: nothing outside may be written or read."""
    from dreamllm_edu.data.readers import laion, llava, mmc4
    from dreamllm_edu.documents.pictures import picture_to_uri  # noqa: F401  loaded before the fork

    kind = "shards with ../ paths, absolute names and links"
    secret = cases.folder / "secret.png"
    from conftest import picture

    picture(3).save(secret)

    def read(corpus) -> None:
        for shard in corpus.shards:
            for record in corpus.read(shard):
                if isinstance(record, ValueError):
                    raise record
                record.document()

    names = {
        "../": "../secret.png",
        "absolute": str(secret),
        "deep": "a/../../secret.png",
        "back": "..\\secret.png",
        "URL": f"file://{secret}",
        "none": "",
        "null": "a\0b",
    }
    for name, path in names.items():
        folder = cases.place()
        (folder / "images").mkdir()
        turns = [{"from": "human", "value": "<image> what?"}, {"from": "gpt", "value": "a secret"}]
        (folder / "a.json").write_text(json.dumps([{"image": path, "conversations": turns}]))
        corpus = llava("llava", folder / "a.json", folder / "images")
        # without a picture's name the record has no picture, and "<image>" is text
        cases.add(kind, f"a picture's name: {name}", lambda corpus=corpus: read(corpus), refused=name != "none")
    for name, link in (("absolute", "/etc/passwd"), ("relative", "../../secret.png"), ("hard", "x.png")):
        folder = cases.place()
        with tarfile.open(folder / "a.tar", "w") as tar:
            for member, data in (("/tmp/../../1.txt", b"a cat"), ("../../evil.txt", b"evil")):
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            info = tarfile.TarInfo("/tmp/../../1.png")
            info.type, info.linkname = (tarfile.LNKTYPE if name == "hard" else tarfile.SYMTYPE), link
            tar.addfile(info)
            info = tarfile.TarInfo("2.png")
            info.type = tarfile.CHRTYPE
            tar.addfile(info)
        cases.add(kind, f"a tar with links: {name}", lambda folder=folder: read(laion("laion", folder / "a.tar")))
        page = {"text_list": ["a cat"], "image_info": [{"image_name": "1.png", "matched_text_index": 0}]}
        (folder / "a.jsonl").write_text(json.dumps(page) + "\n")
        cases.add(
            kind,
            f"MMC4's pictures in a tar with links: {name}",
            lambda folder=folder: read(mmc4("mmc4", folder / "a.jsonl", folder / "a.tar")),
        )
    folder = cases.place()
    with zipfile.ZipFile(folder / "a.jsonl.zip", "w") as archive:
        archive.writestr("../../../evil.jsonl", "{}\n")
        archive.writestr("/tmp/evil", "{}\n")
    (folder / "images").mkdir()
    cases.add(kind, "a zip with ../ inside", lambda: read(mmc4("mmc4", folder / "a.jsonl.zip", folder / "images")))
    bomb = cases.place()
    (bomb / "images").mkdir()
    with zipfile.ZipFile(bomb / "a.jsonl.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("a.jsonl", "w") as file:
            for _ in range(300):
                file.write(b" " * 2**20)
    cases.add(kind, "a zip bomb of one line", lambda: read(mmc4("mmc4", bomb / "a.jsonl.zip", bomb / "images")))


MANIFESTS = {
    "a list": lambda made: [1],
    "nested 100,000 deep": None,
    "other files": lambda made: made.update(files={"../../../../etc/passwd": [1, 1]}),
    "no run": lambda made: made["state"].pop("run"),
    "a run that is a list": lambda made: made["state"].update(run=[1]),
    "a step that is text": lambda made: made["state"].update(step="1; import os"),
    "a step below zero": lambda made: made["state"].update(step=-5),
    "a step of 10^30": lambda made: made["state"].update(step=10**30),
    "updates that are text": lambda made: made["state"].update(updates={"a": 1}),
    "a position that is text": lambda made: made["state"].update(position="x"),
    "files without sizes": lambda made: made.update(files={name: None for name in made["files"]}),
}


def training_folders(cases: Cases) -> None:
    """Folders of a training that was stopped, with a manifest, shares or log that are not what they were."""
    from dreamllm_edu.files import checksum
    from dreamllm_edu.training.trainer import train_part

    kind = "folders of a training with hostile JSON or tensors"

    def train(folder: Path, stop: int | None = None) -> object:
        torch.manual_seed(0)

        def on_step(step, trainer):
            if step == stop:
                raise MemoryError

        loss = lambda m, s, g: {"loss": m(torch.randn(3, 2, generator=g)).square().mean()}
        return train_part(
            torch.nn.Linear(2, 2),
            loss,
            4,
            1e-2,
            folder=folder,
            warmup=1,
            precision="no",
            save_every=1,
            progress=False,
            on_step=on_step,
        )

    def stopped() -> Path:
        folder = cases.place()
        try:
            train(folder, 1)
        except MemoryError:
            pass
        return folder

    for name, change in MANIFESTS.items():
        folder = stopped()
        path = next(folder.glob("step-*")) / "manifest.json"
        if change is None:
            path.write_text("[" * 100_000 + "]" * 100_000)
        else:
            changed(path, change)
        # one that cannot be read is passed over, and the training starts again
        cases.add(kind, f"manifest: {name}", lambda folder=folder: train(folder), refused=False)
    for name, data in tensor_files(cases.canary).items():
        folder = stopped()
        step = next(folder.glob("step-*"))
        path = step / "rank-00000.safetensors"
        path.write_bytes(data)
        files = {path.name: [path.stat().st_size, checksum(path)]}
        changed(step / "manifest.json", lambda made, files=files: made.update(files=files))
        cases.add(kind, f"tensors, with the right checksum: {name}", lambda folder=folder: train(folder))
    for name, shares in {
        "no JSON": "x",
        "a list": "[1]",
        "wrong places": '{"model/weight": [0, 99, [2, 2]]}',
        "deep": "[" * 100_000,
    }.items():
        folder = stopped()
        step = next(folder.glob("step-*"))
        path = step / "rank-00000.safetensors"
        from safetensors.torch import load_file, save_file

        save_file(load_file(path), path, {"shares": shares})
        files = {path.name: [path.stat().st_size, checksum(path)]}
        changed(step / "manifest.json", lambda made, files=files: made.update(files=files))
        cases.add(kind, f"places of the tensors: {name}", lambda folder=folder: train(folder))
    for name, text in {
        "a list": "[1]\n",
        "a number": "3\n",
        "no step": "{}\n",
        "deep": "[" * 100_000 + "\n",
        "step is text": '{"step": "x"}\n',
        "bytes": "\x00\x01\n",
    }.items():
        folder = stopped()
        (folder / "log.jsonl").write_text(text)
        cases.add(kind, f"log: {name}", lambda folder=folder: train(folder), refused=False)


def interrupted(cases: Cases) -> None:
    """Folders that pretend that a save was interrupted: what a loader finishes must stay inside the folder."""
    from dreamllm_edu.models.dreamllm import DreamLLM, DreamLLMProcessor
    from dreamllm_edu.parts.tokenizer import read_tokenizer

    kind = "folders that pretend to hold an interrupted save"
    mine = cases.outside / "mine.txt"
    loaders = {
        "model": DreamLLM.from_pretrained,
        "processor": DreamLLMProcessor.from_pretrained,
        "tokenizer": read_tokenizer,
    }
    lists = {
        "../": json.dumps(["../outside/mine.txt"]),
        "absolute": json.dumps([str(mine)]),
        "no list": "3",
        "no JSON": "{",
    }
    for loader, load in loaders.items():
        for name, text in lists.items():
            folder = cases.checkpoint()
            (folder / ".saved-00000000000000000001-00000000").mkdir()
            (folder / ".saved-00000000000000000001-00000000" / ".obsolete").write_text(text)
            job = lambda folder=folder, load=load: load(folder)
            cases.add(kind, f"{loader}: old files to remove: {name}", job, refused=False)
        folder = cases.checkpoint()
        new = folder / ".saved-00000000000000000001-00000000" / "sub"
        new.mkdir(parents=True)
        (new / "mine.txt").write_text("theirs")
        (folder / "sub").symlink_to(cases.outside, target_is_directory=True)
        job = lambda folder=folder, load=load: load(folder)
        cases.add(kind, f"{loader}: a link that leads out", job, refused=False)


BUILDERS = (weights, remote_code, bombs, templates, archives, training_folders, interrupted)


def judge(said: str, refused: bool, ran: bool, moved: bool) -> str | None:
    """What is wrong with the end of a case, or None. `refused`: it has to be an error."""
    if ran:
        return "CODE RAN"
    if moved:
        return "files outside were changed"
    if said == "loaded":
        return "loaded without an error" if refused else None
    if said.startswith(("TIMEOUT", "DIED")):
        return said
    kind, _, message = said.removeprefix("ERROR ").partition(": ")
    clear = (
        kind in ("ValueError", "OSError", "Broken", "FileNotFoundError", "UnicodeDecodeError")
        and len(message.split()) > 2
    )
    return None if clear else f"{kind}: {message[:160]}"


def opened(job: Callable[[], object]) -> Callable[[], str]:
    def run() -> str:
        job()
        return "loaded"

    return run


def results(cases: Cases) -> Iterator[tuple[str, str, str | None, str]]:
    """(kind, name, what is wrong or None, what was said) of each case."""
    before = fingerprint(cases.outside)
    names = {path.name for path in cases.folder.iterdir()}
    for kind, name, job, refused in cases.all:
        said = in_fork(opened(job), timeout=120, memory=3 * 2**30)
        ran = cases.canary.exists()
        cases.canary.unlink(missing_ok=True)
        now = {path.name for path in cases.folder.iterdir()}
        yield kind, name, judge(said, refused, ran, bool(now - names) or fingerprint(cases.outside) != before), said
        names |= now
        cases.fill_outside()


def run(folder: Path, quick: bool, seed: int) -> list[dict]:
    import dreamllm_edu.app.cli
    import dreamllm_edu.models.dreamllm.generation  # noqa: F401  loaded before the forks

    torch.set_num_threads(1)
    cases = Cases(folder)
    for build in BUILDERS:
        build(cases)
    if quick:
        cases.all = cases.all[::6]
    rows = {}
    for kind, name, wrong, _ in results(cases):
        tried, misses = rows.setdefault(kind, ([], []))
        tried.append(name)
        if wrong:
            misses.append(f"{name}: {wrong}")
    return [
        row(f"{kind}: no code ran, the error is clear", len(tried), misses) for kind, (tried, misses) in rows.items()
    ]
