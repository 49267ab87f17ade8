#!/bin/sh
# Everything that needs an NVIDIA GPU: what works here, the GPU tests, every operation beside
# libraries' (--peers all: those that are installed), the cost sweep. Run it again to resume. No step
# takes over nine minutes; a queue of short jobs runs one of PARTS a job. Needs what
# `pip install .[test]` installs.
#
#   sh results/h100.sh [FOLDER]     leaves doctor.txt, tests.txt, ops.jsonl, cost.jsonl, figures
#   PARTS="ssd wkv7" sh results/h100.sh     some parts: tests, attention, ssd, wkv7, long_conv, cost
parts=${PARTS:-tests attention ssd wkv7 long_conv cost}
out=${1:-runs/h100}
python=${PYTHON:-python3}
mkdir -p "$out"
$python -m harness doctor | tee "$out/doctor.txt"
for part in $parts; do
  case $part in
    tests) timeout 300 $python -m pytest -m gpu -q -n0 tests/harness 2>&1 | tee "$out/tests.txt" ;;
    cost)
      timeout 330 $python -m harness cost --preset h100 --time-limit 60 --out "$out/cost"
      $python -m harness export "$out/cost" "$out/cost.jsonl"
      $python -m harness plot "$out/cost.jsonl" --out "$out/figures"
      ;;
    *)
      timeout 540 $python -m harness cost --preset h100-ops --peers all --op "$part" \
        --time-limit 30 --out "$out/ops"
      $python -m harness export "$out/ops" "$out/ops.jsonl"
      ;;
  esac
done
