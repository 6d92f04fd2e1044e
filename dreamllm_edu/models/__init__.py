"""Families of models, one package each. `base` says what the rest of the package knows of one."""
import importlib
import pkgutil

from .base import FAMILIES


def families() -> dict[str, type]:
    """Every family in this folder, by the name that recipes use. A family registers itself in its
    module `family` (`base.register_family`); a new one needs a folder here and nothing else."""
    for found in pkgutil.iter_modules(__path__):
        if found.ispkg:
            importlib.import_module(f"{__name__}.{found.name}.family")
    return FAMILIES
