"""Families of models; `base` says what the rest of the package knows of one."""
