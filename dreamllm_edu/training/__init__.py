"""Training: stages, recipes, and one trainer for every scale."""
from .._moved import divided

__getattr__ = divided(__name__)
