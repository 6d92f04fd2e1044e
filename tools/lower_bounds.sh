#!/usr/bin/env bash
# Tests with the oldest versions that settings.ini admits (constraints-lowest.txt), in an environment of their own.
#
#     bash tools/lower_bounds.sh [FOLDER]     # FOLDER: where the environment is made, .venv-lowest if not given; an existing one is used again
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.venv-lowest}
python=$folder/bin/python
if [ ! -f "$folder/.installed" ] || [ constraints-lowest.txt -nt "$folder/.installed" ] || [ settings.ini -nt "$folder/.installed" ]; then
    "${PYTHON:-python3}" -m venv "$folder"
    "$python" -m pip install --quiet --constraint constraints-lowest.txt . pytest sentencepiece protobuf peft tensorboard resvg_py
    "$python" -m pip uninstall --quiet --yes dreamllm_edu  # the tests read the checkout
    touch "$folder/.installed"
fi
export PYTHONPATH=$PWD HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
"$python" -m pytest -q -p no:cacheprovider tests/test_equivalences.py tests/test_bad_input.py tests/test_saving.py tests/test_hub.py \
    tests/test_official.py tests/test_data.py tests/test_corpora.py tests/test_planner.py
