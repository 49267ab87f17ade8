#!/bin/sh
# Everything that needs an NVIDIA GPU: what works here, the tests of our kernels, those of the
# harness, the plans of four operations, every operation beside libraries' (--peers all: those that
# are installed), the cost sweep. Run it again to resume. No step takes over nine minutes; a queue of
# short jobs runs one of PARTS a job. Needs what `pip install .[test]` installs; pytest's plug-ins may
# be missing.
#
#   sh results/h100.sh [FOLDER]     leaves doctor.txt, kernels.txt, long_kernels.txt, hopper.txt,
#                                   tests.txt, attention_plans.txt, attention_tiles.txt,
#                                   plans.txt, ops.jsonl, cost.jsonl, figures
#   PARTS="kernels ssd" sh results/h100.sh     some parts: kernels, long_kernels (the long
#                                              convolution's), hopper (attention in Gluon, which
#                                              might hang), tests, attention_plans, plans,
#                                              attention, ssd, wkv7, long_conv, cost,
#                                              loss:LENGTH (of models of 10M and 30M parameters)
parts=${PARTS:-kernels long_kernels hopper tests attention_plans plans attention ssd wkv7 long_conv cost}
out=${1:-runs/h100}
python=${PYTHON:-python3}
unset TRITON_INTERPRET
mkdir -p "$out"
$python -m harness doctor | tee "$out/doctor.txt"
# The project's options name plug-ins, without which pytest refuses them.
pytest="$python -m pytest -o addopts= -m gpu -q -ra --continue-on-collection-errors"
for part in $parts; do
  case $part in
    kernels) timeout 480 $pytest tests/archs/test_[!l]*_kernel.py 2>&1 | tee "$out/kernels.txt" ;;
    long_kernels)
      timeout 520 $pytest tests/archs/test_long_*_kernel.py 2>&1 | tee "$out/long_kernels.txt"
      ;;
    hopper)
      timeout 150 $pytest tests/archs/test_attention_hopper.py 2>&1 | tee "$out/hopper.txt"
      ;;
    tests) timeout 480 $pytest tests/harness 2>&1 | tee "$out/tests.txt" ;;
    attention_plans)
      for op in attention64 attention128 decode; do
        timeout 80 $python tests/benchmarks/gpu_plans.py --op $op 2>&1
      done | tee "$out/attention_plans.txt"
      timeout 240 $python tests/benchmarks/gpu_tiles.py 2>&1 | tee "$out/attention_tiles.txt"
      ;;
    plans)
      for op in ssd wkv7 long_conv; do
        timeout 175 $python tests/benchmarks/gpu_plans.py --op $op 2>&1
      done | tee "$out/plans.txt"
      ;;
    cost)
      timeout 330 $python -m harness cost --preset h100 --time-limit 60 --out "$out/cost"
      $python -m harness export "$out/cost" "$out/cost.jsonl"
      $python -m harness plot "$out/cost.jsonl" --out "$out/figures"
      ;;
    loss:*)
      timeout 520 $python -m harness loss --preset h100 --length "${part#loss:}" --out "$out/loss"
      $python -m harness export "$out/loss" "$out/loss.jsonl"
      $python -m harness plot "$out/loss.jsonl" --out "$out/loss-figures"
      ;;
    *)
      timeout 520 $python -m harness cost --preset h100-ops --peers all --op "$part" \
        --time-limit 30 --out "$out/ops"
      $python -m harness export "$out/ops" "$out/ops.jsonl"
      ;;
  esac
done
