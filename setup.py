"""Packaging, read from settings.ini (nbdev 2's configuration)."""
import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf8")
config = parser["DEFAULT"]

# `data/` and `recipes/` stand at the top of the repository and are installed as the package's `_data` and `_recipes`.
package_dir = {"dreamllm_edu._data": "data", "dreamllm_edu._recipes": "recipes"}
for path in [here / "data", *(p for p in (here / "data").rglob("*") if p.is_dir() and p.name != "__pycache__")]:
    parts = path.relative_to(here / "data").parts
    package_dir[".".join(("dreamllm_edu", "_data") + parts)] = path.relative_to(here).as_posix()

setup(
    name=config["lib_name"],
    version=config["version"],
    description=config["description"],
    long_description=(here / "README.md").read_text(encoding="utf8") if (here / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    author=config["author"],
    author_email=config["author_email"],
    url=config["git_url"],
    license="Apache-2.0",
    keywords=config["keywords"].split(),
    python_requires=f">={config['min_python']}",
    packages=find_packages(include=["dreamllm_edu*"]) + list(package_dir),
    package_dir=package_dir,
    package_data={"": ["*.json", "*.jsonl", "*.zip", "*.xz", "*.md", "*.txt", "*.yaml"], "dreamllm_edu": ["weights/**/*"],
                  "dreamllm_edu.app": ["templates/*.jinja"]},
    include_package_data=False,
    install_requires=shlex.split(config["requirements"]),
    extras_require={"dev": shlex.split(config["dev_requirements"]), "official": shlex.split(config["official_requirements"]),
                    "deepspeed": shlex.split(config["deepspeed_requirements"])},
    entry_points={"console_scripts": shlex.split(config["console_scripts"]),
                  "nbdev": ["dreamllm_edu=dreamllm_edu._modidx:d"]},  # the docs link names to pages and source
    classifiers=["Programming Language :: Python :: 3", "License :: OSI Approved :: Apache Software License",
                 "Intended Audience :: Education", "Topic :: Scientific/Engineering :: Artificial Intelligence"],
    zip_safe=False,
)
