"""One model that understands and creates pictures and text, built step by step: DreamLLM.

    from dreamllm_edu import Document, Dream, DreamLLM, DreamLLMProcessor

    model, processor = DreamLLM.from_pretrained("mini"), DreamLLMProcessor.from_pretrained("mini")
    model.generate(Document(["red apple in Noto style:", Dream()]), processor)

Importing the package costs nothing: a name is loaded when it is used for the first time (PEP 562), and so is our model
when `AutoModel`, `AutoConfig` or `AutoProcessor` of transformers are asked for it."""
from importlib import import_module as _import_module
from typing import TYPE_CHECKING

from . import _auto, _moved

__version__ = "0.1.0"

_MODULES = {  # public name -> the module that defines it
    "DreamLLM": "models.dreamllm.model",
    "DreamLLMConfig": "models.dreamllm.config",
    "DreamLLMPipeline": "models.dreamllm.pipeline",
    "DreamLLMProcessor": "models.dreamllm.processor",
    "Document": "documents.document",
    "Dream": "documents.document",
    "Trainer": "training.trainer",
    "World": "data.world",
}

__all__ = [
    "Document", "Dream", "DreamLLM", "DreamLLMConfig", "DreamLLMPipeline", "DreamLLMProcessor", "Trainer", "World",
]

if TYPE_CHECKING:  # for editors and type checkers, which do not run `__getattr__`
    from .data.world import World
    from .documents.document import Document, Dream
    from .models.dreamllm.config import DreamLLMConfig
    from .models.dreamllm.model import DreamLLM
    from .models.dreamllm.pipeline import DreamLLMPipeline
    from .models.dreamllm.processor import DreamLLMProcessor
    from .training.trainer import Trainer


def __getattr__(name: str) -> object:
    """The public name `name`, loaded now and kept."""
    if name not in _MODULES:
        raise AttributeError(f"module 'dreamllm_edu' has no attribute {name!r}; it exports {', '.join(__all__)}, "
                             "and its modules hold the rest", name=name)
    value = getattr(_import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_moved.check_command()
_moved.install()
_auto.install()
