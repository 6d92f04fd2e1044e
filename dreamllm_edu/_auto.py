"""After `import dreamllm_edu` the auto classes of transformers know our model, and nobody pays for it earlier.

`AutoConfig`, `AutoModel` and `AutoProcessor` know a model only after its classes were registered, which
needs the classes, and these need torch, transformers and diffusers: seconds. So nothing is registered yet.
Instead the three methods where a name or a folder comes in are wrapped. The first call that may mean our
model imports `dreamllm_edu.models.dreamllm`, which registers its classes, and puts the original methods
back. `AutoModel.from_pretrained` asks `AutoConfig` first; a configuration object that is passed in exists
only where the classes are registered already.

If transformers is not imported yet, a finder on `sys.meta_path` waits for its two modules."""

import functools
import importlib
import importlib.machinery
import sys
import threading
import warnings
from pathlib import Path
from types import ModuleType
from collections.abc import Sequence

from ._moved import real_spec, run_after

MODEL, MODEL_TYPE, PROCESSOR = "dreamllm_edu.models.dreamllm", "dreamllm_edu", "DreamLLMProcessor"
METHODS = {  # module of transformers -> class -> its class methods
    "transformers.models.auto.configuration_auto": {"AutoConfig": ("from_pretrained", "for_model")},
    "transformers.models.auto.processing_auto": {"AutoProcessor": ("from_pretrained",)},
}
_lock = threading.RLock()
_wrapped: list[tuple[type, str, classmethod, classmethod]] = []  # (class, method, original, what stands in for it)


def may_be_ours(name: object, subfolder: str = "") -> bool:
    """Whether a model type, a folder, a JSON file or a hub name may mean our model; what lies on the disk is read."""
    if name == MODEL_TYPE:
        return True
    try:
        place = Path(str(name), subfolder or "")
        if not place.exists():
            return "/" in str(name)  # a model on the hub has an owner
        files = place.glob("*config.json") if place.is_dir() else [place]
        texts = [path.read_text(encoding="utf8") for path in files]
    except (OSError, ValueError):
        return False  # transformers says what is wrong with it
    return any(f'"{MODEL_TYPE}"' in text or PROCESSOR in text for text in texts)


def register() -> None:
    """Import our classes, which registers them, and put the original methods back."""
    try:
        importlib.import_module(MODEL)
    except Exception as error:  # another model must load all the same
        warnings.warn(
            f"{MODEL} could not be imported ({type(error).__name__}: {error}); transformers will not know it",
            stacklevel=3,
        )
    with _lock:
        while _wrapped:
            owner, method, original, stand_in = _wrapped.pop()
            if owner.__dict__.get(method) is stand_in:  # nobody has wrapped it again since
                setattr(owner, method, original)


class StandIn(classmethod):
    """What takes the place of a class method of transformers until our classes are registered."""


def wrap(owner: type, method: str) -> None:
    """Let `owner.method(name, ...)` call `register` first, if the name may mean our model."""
    original = owner.__dict__.get(method)
    if not isinstance(original, classmethod) or isinstance(original, StandIn):
        return

    @functools.wraps(original.__func__)
    def asks_first(cls, *args, **kwargs):
        name = args[0] if args else kwargs.get("pretrained_model_name_or_path", kwargs.get("model_type"))
        if may_be_ours(name, kwargs.get("subfolder", "")):
            register()
        return original.__func__(cls, *args, **kwargs)

    stand_in = StandIn(asks_first)
    _wrapped.append((owner, method, original, stand_in))
    setattr(owner, method, stand_in)


def prepare(module: ModuleType) -> None:
    """Wrap the methods of a module of transformers that has just been imported; if it has changed, leave it."""
    with _lock:
        if MODEL in sys.modules:  # its classes are registered, or will be in a moment
            return
        for name, methods in METHODS[module.__name__].items():
            owner = getattr(module, name, None)
            if isinstance(owner, type):
                for method in methods:
                    wrap(owner, method)


class Finder:
    """Waits on `sys.meta_path` for the modules of transformers that hold the auto classes."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in METHODS:
            return None
        spec = real_spec(self, name, path, target)
        if spec is not None:
            run_after(spec.loader, prepare)
        return spec


def install() -> None:
    """Wrap the auto classes now, or as soon as transformers is imported; a second call does nothing."""
    with _lock:
        if not any(type(finder).__module__ == __name__ for finder in sys.meta_path):
            sys.meta_path.insert(0, Finder())
    for name in METHODS:
        if name in sys.modules and not getattr(sys.modules[name].__spec__, "_initializing", False):
            prepare(sys.modules[name])
