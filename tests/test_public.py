"""What a user meets first: `import dreamllm_edu`, its names, the auto classes of transformers, the names of version 0.1.0."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import dreamllm_edu
from dreamllm_edu import Document, Dream, DreamLLM, DreamLLMPipeline, DreamLLMProcessor, World
from dreamllm_edu.models.dreamllm.generation import DiffusionDrawer

from conftest import ROOT, make_tiny

NAMES = ["DreamLLM", "DreamLLMConfig", "DreamLLMProcessor", "DreamLLMPipeline", "Document", "Dream", "World"]


def fresh(code, cwd=None, options=(), check=True):
    """The standard output of `code` in an interpreter of its own."""
    run = subprocess.run(
        [sys.executable, *options, "-c", code],
        cwd=cwd or ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0 or not check, run.stderr[-2000:]
    return run.stdout.strip() if check else run


# ---------------------------------------------------------------- import dreamllm_edu


def test_the_import_is_fast_and_loads_no_library():
    code = """
import sys, time
began, busy = time.perf_counter(), time.process_time()
import dreamllm_edu
took, busy = time.perf_counter() - began, time.process_time() - busy
heavy = {'torch', 'transformers', 'diffusers', 'datasets', 'numpy', 'PIL', 'fastcore'} & set(sys.modules)
assert not heavy, heavy
print(took, busy)
"""
    runs = [tuple(map(float, fresh(code).split())) for _ in range(5)]
    seconds, busy = min(wall for wall, _ in runs), min(cpu for _, cpu in runs)
    print(f"import dreamllm_edu: {1000 * seconds:.1f} ms, of which {1000 * busy:.1f} ms of the processor")
    assert busy < 0.05, "the processor's time, because the clock also counts the machine's other work"


def test_public_names_in_a_fresh_interpreter():
    code = f"""
from dreamllm_edu import {", ".join(NAMES)}
print([thing.__name__ for thing in ({", ".join(NAMES)})])
assert all(hasattr(DreamLLM, name) for name in ('generate', 'from_official', 'from_pretrained')) and DreamLLM.__doc__
"""
    assert fresh(code) == str(NAMES)


def test_documents_need_no_torch():
    assert fresh(
        "from dreamllm_edu import Document, Dream; import sys; print('transformers' in sys.modules, Document(['a', Dream()]).text)"
    ).startswith("False a")


def test_names_are_listed_and_others_refused():
    assert set(NAMES) < set(dreamllm_edu.__all__) <= set(dir(dreamllm_edu)) and dreamllm_edu.__version__ == "0.1.0"
    with pytest.raises(
        AttributeError, match="module 'dreamllm_edu' has no attribute 'DreamLM'; it exports Document, .*DreamLLM"
    ):
        dreamllm_edu.DreamLM
    with pytest.raises(ImportError):
        exec("from dreamllm_edu import Nothing")


def test_every_public_name_has_a_module_and_a_real_import_for_editors():
    import ast

    tree = ast.parse((ROOT / "dreamllm_edu/__init__.py").read_text(encoding="utf8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    typed = {alias.name: node.module for node in block.body for alias in node.names}
    assert typed == dreamllm_edu._MODULES and sorted(typed) == sorted(dreamllm_edu.__all__)


# ---------------------------------------------------------------- the auto classes of transformers


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a tiny model and the miniature's processor."""
    from dreamllm_edu.models.dreamllm.weights import mini_processor

    folder = tmp_path_factory.mktemp("public") / "tiny"
    make_tiny().save_pretrained(folder)
    mini_processor().save_pretrained(folder)
    other = folder.parent / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


CALLS = {
    "AutoConfig.from_pretrained(folder)": "DreamLLMConfig",
    "AutoModel.from_pretrained(folder)": "DreamLLM",
    "AutoModelForImageTextToText.from_pretrained(folder)": "DreamLLM",
    "AutoProcessor.from_pretrained(folder)": "DreamLLMProcessor",
    "AutoModel.from_config(AutoConfig.from_pretrained(folder))": "DreamLLM",
    "AutoConfig.for_model('dreamllm_edu')": "DreamLLMConfig",
    "AutoConfig.from_pretrained(folder + '/config.json')": "DreamLLMConfig",
}
AUTO = """
import os, sys
{imports}
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
from dreamllm_edu import _auto
folder, ours = {folder!r}, 'dreamllm_edu.models.dreamllm'
assert AutoConfig.from_pretrained(folder + '/../other').model_type == 'llama'
assert ours not in sys.modules and 'diffusers' not in sys.modules, 'paid for before it is needed'
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel  # once, for all the calls below
for call in {calls!r}:
    sys.stdout.flush()
    if not os.fork():  # each of them is the first one of its process
        print(call, type(eval(call)).__name__, flush=True)
        assert ours in sys.modules and not _auto._wrapped
        assert all(not isinstance(vars(c).get('from_pretrained'), _auto.StandIn) for c in (AutoConfig, AutoProcessor)), 'the originals are back'
        os._exit(0)
    assert os.wait()[1] == 0, call
"""


@pytest.mark.parametrize(
    "imports",
    ["import dreamllm_edu", "import transformers; transformers.AutoConfig; import dreamllm_edu"],
    ids=["before", "after"],
)
def test_auto_classes_know_the_model(imports, saved):
    assert fresh(AUTO.format(imports=imports, folder=str(saved), calls=list(CALLS))).splitlines() == [
        f"{call} {kind}" for call, kind in CALLS.items()
    ]


def test_threads_ask_at_once(saved):
    code = f"""
import threading, dreamllm_edu
from transformers import AutoConfig
found = []
ask = lambda: found.append(type(AutoConfig.from_pretrained({str(saved)!r})).__name__)
threads = [threading.Thread(target=ask) for _ in range(8)]
[t.start() for t in threads]; [t.join() for t in threads]
print(found)
"""
    assert fresh(code) == str(["DreamLLMConfig"] * 8)


def test_installing_twice_or_into_a_changed_library_does_no_harm():
    code = """
import sys, types, dreamllm_edu
from dreamllm_edu import _auto, _moved
before = len(sys.meta_path)
_auto.install(); _moved.install()
assert len(sys.meta_path) == before
changed = types.ModuleType('transformers.models.auto.configuration_auto')
changed.AutoConfig = type('AutoConfig', (), {'from_pretrained': staticmethod(lambda name: name)})
_auto.prepare(changed)
assert changed.AutoConfig.from_pretrained('a') == 'a' and not _auto._wrapped
_auto.prepare(types.ModuleType('transformers.models.auto.processing_auto'))
print('fine')
"""
    assert fresh(code) == "fine"


# ---------------------------------------------------------------- the names of version 0.1.0


def test_old_modules_work_and_name_the_new_place():
    code = """
import sys, warnings
import dreamllm_edu
with warnings.catch_warnings(record=True) as heard:
    warnings.simplefilter('always')
    import dreamllm_edu.model
    assert 'torch' not in sys.modules, 'nothing is imported before a name is used'
    from dreamllm_edu.generation import DreamLLM
    from dreamllm_edu.model import checked_tensors, mini
    from dreamllm_edu.tokenization import DreamLLMProcessor, Sequence
    from dreamllm_edu.train import read_recipe
    from dreamllm_edu.training import set_trainable
    import dreamllm_edu.training.stage
    from dreamllm_edu.training import stage
    from dreamllm_edu.evaluation import load_judge
said = [str(w.message) for w in heard if w.category is DeprecationWarning and 'dreamllm_edu' in str(w.message)]
assert all(w.filename == '<string>' for w in heard if 'dreamllm_edu' in str(w.message)), 'it names the line that is to be changed'
for old, new in (('model', 'models.dreamllm.model'), ('generation.DreamLLM', 'models.dreamllm.model.DreamLLM'), ('model.checked_tensors', 'files.read_tensors'),
                 ('tokenization.Sequence', 'sequences.Sequence'), ('training.set_trainable', 'training.stage.set_trainable')):
    assert any(message.startswith(f'dreamllm_edu.{old} is now ') and f'dreamllm_edu.{new}' in message for message in said), (old, said)
assert stage is dreamllm_edu.training.stage
from dreamllm_edu.models.dreamllm.model import DreamLLM as new
assert DreamLLM is new
try:
    dreamllm_edu.model.nothing
except AttributeError as error:
    print(error)
"""
    assert fresh(code) == "module 'dreamllm_edu.model' has no attribute 'nothing'"


@pytest.mark.parametrize(
    "old",
    [
        "model",
        "generation",
        "tokenization",
        "cli",
        "corpora",
        "demo",
        "diffusion",
        "language",
        "losses",
        "official",
        "planner",
        "queries",
        "vision",
    ],
)
def test_every_old_module_leads_to_modules_that_exist(old):
    from dreamllm_edu import _moved

    for place in _moved.MOVED[old]:
        path = ROOT / "dreamllm_edu" / place.replace(".", "/")
        assert path.with_suffix(".py").exists() or path.is_dir(), f"{old} leads to {place}, which is not there"


def test_the_old_command_runs():
    run = subprocess.run(
        [sys.executable, "-m", "dreamllm_edu.cli", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert run.returncode == 0 and "generate" in run.stdout, run.stderr
    run = subprocess.run(
        [sys.executable, "-m", "dreamllm_edu.model"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert run.returncode == 1 and "is no command" in run.stderr


# ---------------------------------------------------------------- the pipeline


@pytest.fixture(scope="module")
def pipe():
    return DreamLLMPipeline.from_pretrained("mini")


def test_the_pipeline_is_generate_in_the_manner_of_diffusers(pipe):
    prompt = Document(["red apple in Noto style:", Dream()])
    made = pipe(prompt, num_inference_steps=2, guidance_scale=3.0, generator=torch.Generator().manual_seed(1))
    plain = pipe.model.generate(
        prompt,
        pipe.processor,
        max_new_tokens=0,
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(1),
    )
    assert (
        made.documents == [plain]
        and made.images == plain.pictures
        and made[1] == made.images
        and made.to_tuple() == (made.documents, made.images)
    )
    documents, images = pipe(
        ["red apple in Noto style:"],
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(1),
        return_dict=False,
    )
    assert images == made.images and documents[0].parts[0] == "red apple in Noto style:", (
        "a string is a prompt for one picture"
    )


def test_only_drawn_pictures_are_images_of_the_output(pipe):
    given = World().picture("noto/" + World().by_name["red apple"]["key"])
    made = pipe([Document(["a ", given, " b:", Dream()]), "penguin in Noto style:"], num_inference_steps=1)
    assert len(made.images) == 2 and given not in made.images
    assert made.images == [made.documents[0].parts[3], made.documents[1].parts[1]]
    told = pipe(Document([given]), num_inference_steps=1, max_new_tokens=3, max_pictures=0)
    assert told.images == [] and len(told.documents[0].parts) == 2


def test_the_pipeline_is_saved_moved_and_taken_apart(tmp_path, processor):
    small = DreamLLMPipeline(make_tiny(), processor)
    assert small.to("cpu") is small and small.components.keys() == {"model", "processor"} and "DreamLLM" in repr(small)
    small.save_pretrained(tmp_path / "small")
    again = DreamLLMPipeline.from_pretrained(tmp_path / "small", local_files_only=True)
    prompt = Document(["a red cat", Dream()])
    assert again(prompt, num_inference_steps=2).images == small(prompt, num_inference_steps=2).images
    assert again.to(torch.bfloat16).model.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="generate takes a Document"):
        small([3])


def test_the_processor_of_the_miniature_has_its_name(tmp_path):
    mini = DreamLLMProcessor.from_pretrained("mini")
    assert (
        type(mini) is DreamLLMProcessor
        and mini.num_queries == 8
        and DreamLLMProcessor.from_pretrained("mini", max_length=64).max_length == 64
    )
    mini.save_pretrained(tmp_path)
    assert DreamLLMProcessor.from_pretrained(tmp_path).tokenizer.get_vocab() == mini.tokenizer.get_vocab()
    with pytest.raises(ValueError, match="'mini' takes no revisions"):
        DreamLLMProcessor.from_pretrained("mini", revisions=1)
    with pytest.raises((OSError, ValueError)):
        DreamLLMProcessor.from_pretrained(tmp_path / "nowhere")


def test_a_drawer_computes_the_null_condition_once(monkeypatch):
    model, calls = make_tiny(), []
    plain = DreamLLM.null_condition
    monkeypatch.setattr(DreamLLM, "null_condition", lambda self: calls.append(1) or plain(self))
    drawer = DiffusionDrawer(model)
    states = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(0))
    seeds = lambda *numbers: [torch.Generator().manual_seed(n) for n in numbers]
    first, again = (drawer.draw(states, seeds(0, 1, 2), 2.0, 2) for _ in range(2))
    assert first == again and len(calls) == 1 and first[0].mode == "RGB"
    (alone,) = drawer.draw(states[1:2], seeds(1), 2.0, 2)
    assert abs(np.asarray(alone, int) - np.asarray(first[1], int)).max() <= 1
