"""DreamLLM: a language model that reads pictures through CLIP and draws them through dream queries (Dong et al. 2024)."""
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from .config import DreamLLMConfig
from .model import DreamLLM
from .processor import DreamLLMProcessor
from . import generation, official, weights  # noqa: F401  each adds methods to the classes

AutoConfig.register(DreamLLMConfig.model_type, DreamLLMConfig)
AutoModel.register(DreamLLMConfig, DreamLLM)
AutoModelForImageTextToText.register(DreamLLMConfig, DreamLLM)
AutoProcessor.register(DreamLLMConfig, DreamLLMProcessor)
