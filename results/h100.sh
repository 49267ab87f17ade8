#!/bin/sh
# Everything that needs an NVIDIA GPU, in one go and within ten minutes: what works here, the GPU
# tests, the cost sweep. Run it again to resume the sweep. Needs what `pip install .` installs.
#
#   sh results/h100.sh [FOLDER]     leaves doctor.txt, tests.txt, cost.jsonl, figures in FOLDER
out=${1:-runs/h100}
python=${PYTHON:-python3}
mkdir -p "$out"
$python -m harness doctor | tee "$out/doctor.txt"
timeout 150 $python -m pytest -m gpu -q -n0 tests/harness 2>&1 | tee "$out/tests.txt"
timeout 330 $python -m harness cost --preset h100 --time-limit 60 --out "$out/cost"
$python -m harness export "$out/cost" "$out/cost.jsonl"
$python -m harness plot "$out/cost.jsonl" --out "$out/figures"
