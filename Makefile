# make quickstart     train a small model on this machine and look at what it writes
# make test           install what the tests need, check style and types, run the tests
# make ablation-demo  many narrow heads or one wide one, on a memory task: 9 small runs and a report, 5 minutes on 2 cores
# make faults         kill runs, fill disks, damage checkpoints and caches, far more often than the tests do: 10 minutes

PYTHON ?= python3
VENV ?= .venv
OUT ?= runs/quickstart
BIN := $(VENV)/bin

# $(call alive,what,command): say what runs, then a dot every 1.5 s until it ends.
alive = @printf '%s ' '$(1)'; ( while sleep 1.5; do printf .; done ) & beat=$$!; trap 'kill $$beat; echo' EXIT; $(2)

.PHONY: quickstart ablation-demo test faults check clean

quickstart: $(VENV)/run.stamp
	$(BIN)/python train.py --config configs/quickstart.yaml --out $(OUT)

ablation-demo: $(VENV)/run.stamp
	$(BIN)/python -m scripts.ablate_heads --config configs/ablation/demo.yaml --out runs/ablation-demo --pairs 8x4 4x8 1x32 --parallel 2

test: check
	$(BIN)/python -m pytest -n 2

faults: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n 2 -m faults --faults tests/test_fault_*.py

check: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror csrc/*.cu csrc/*.cuh csrc/*.cpp csrc/*.h
	$(BIN)/mypy

# Anew whenever the requirements change; the constraints name every tested version, which makes it repeatable.
$(VENV)/run.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'error: expected Python 3.11 or later, got '"$$($(PYTHON) --version)"'; make PYTHON=... names another'; exit 2; }
	$(call alive,making a virtual environment in $(VENV),$(PYTHON) -m venv $(VENV))
	$(call alive,installing with pip (minutes the first time),$(BIN)/python -m pip install -q -c constraints.txt -e .)
	@touch $@

$(VENV)/test.stamp: $(VENV)/run.stamp
	$(call alive,installing what the tests need,$(BIN)/python -m pip install -q -c constraints.txt -e '.[test]')
	@touch $@

clean:
	rm -rf $(VENV) .cache runs
