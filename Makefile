# make quickstart   train a small model on this machine and look at what it writes
# make test         install what the tests need, check style and types, run the tests

PYTHON ?= python3
VENV ?= .venv
OUT ?= runs/quickstart
BIN := $(VENV)/bin

.PHONY: quickstart test check clean

quickstart: $(VENV)/run.stamp
	@echo "starting accelerate"
	$(BIN)/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	  train.py --config configs/quickstart.yaml --out $(OUT)

test: $(VENV)/test.stamp check
	$(BIN)/python -m pytest -n 2

check: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Anew whenever the requirements change; a constraint on each tested version makes it repeatable.
$(VENV)/run.stamp: pyproject.toml constraints.txt
	@echo "making a virtual environment in $(VENV) and installing (a few minutes the first time)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e .
	@touch $@

$(VENV)/test.stamp: $(VENV)/run.stamp
	$(BIN)/python -m pip install -c constraints.txt -e '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) .cache runs
