"""DreamLLM (Dong et al. 2024): a language model that reads pictures and draws them through dream queries."""
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from .config import DreamLLMConfig
from .model import DreamLLM
from .processor import DreamLLMProcessor
from . import generation, weights  # noqa: F401  each adds methods to the classes
from .official import OfficialDreamLLM
from .pipeline import DreamLLMPipeline

__all__ = ["DreamLLM", "DreamLLMConfig", "DreamLLMPipeline", "DreamLLMProcessor", "OfficialDreamLLM"]

AutoConfig.register(DreamLLMConfig.model_type, DreamLLMConfig, exist_ok=True)
AutoModel.register(DreamLLMConfig, DreamLLM, exist_ok=True)
AutoModelForImageTextToText.register(DreamLLMConfig, DreamLLM, exist_ok=True)
AutoProcessor.register(DreamLLMConfig, DreamLLMProcessor, exist_ok=True)
