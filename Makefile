# make demo   the main job: set everything up, run the quick sweep, draw the figures
# make test   set everything up and run all tests that need no GPU
# make lint   format, lint and types

PYTHON ?= python3
OUT ?= runs/demo
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --constraint constraints.txt
NVIDIA := nvidia-smi -L 2>/dev/null | grep -q ^GPU
CUDA_BUILD := $(BIN)/python -c 'import sys, torch; sys.exit(torch.version.cuda is None)'

.PHONY: demo test lint

demo: $(VENV)/installed
	@if $(NVIDIA); then echo "== NVIDIA GPU found: measuring there"; else \
	  echo "== no NVIDIA GPU: measuring on the CPU, about four minutes on two cores"; fi
	@echo "== measuring (records go to $(OUT)/records; the same command resumes)"
	$(BIN)/seqscale cost --preset quick --out $(OUT)
	@echo "== training"
	$(BIN)/seqscale loss --preset demo --out $(OUT)-loss
	@echo "== fitting and drawing"
	$(BIN)/seqscale plot $(OUT)-loss
	$(BIN)/seqscale plot $(OUT)
	@echo "== cells: $(OUT)/cells.csv   figures: $(OUT)/figures   table: $(OUT)/figures/summary.md"
	@echo "== losses: $(OUT)-loss/cells.csv   figures: $(OUT)-loss/figures"

test: $(VENV)/installed-test
	$(BIN)/python -m pytest

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

$(VENV)/created:
	@echo "== creating $(VENV)"
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/installed: $(VENV)/created pyproject.toml constraints.txt
	@echo "== installing seqscale and what it needs (PyTorch is large: this can take minutes)"
	$(INSTALL) --editable .
	@if $(NVIDIA) && ! $(CUDA_BUILD); then \
	  echo "== an NVIDIA GPU, and a PyTorch without CUDA: installing the CUDA build (gigabytes)"; \
	  $(PIP) --isolated install --quiet --force-reinstall --constraint constraints.txt torch; \
	fi
	@touch $@

# mamba-ssm is a parity partner: its PyTorch listing of SSD is used, its CUDA extension is not.
$(VENV)/installed-test: $(VENV)/installed
	@echo "== installing what the tests need"
	$(INSTALL) --editable '.[test,dev]' setuptools wheel
	MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE \
	  $(INSTALL) --no-build-isolation --no-deps mamba-ssm==2.3.2.post1
	@touch $@
