# `make repro` and `make test` need Python 3.11, git and make; all else goes into .venv.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
ACTIVATE := export PATH="$(CURDIR)/$(VENV)/bin:$$PATH" &&

.PHONY: repro test lint

repro: $(VENV)/installed
	@$(ACTIVATE) dvc repro
	@echo
	@cat evaluation.txt
	@echo
	@$(ACTIVATE) dvc metrics show models/metrics.json
	@echo
	@echo "model      models/gae.safetensors"
	@echo "features   features/  (features/index.json lists them)"
	@echo "plots      plots/figures/ and plots/network/; dvc plots show draws the training curves"
	@echo "metrics    metrics.json and models/metrics.json, above; dvc metrics diff compares them with those of HEAD"

test: $(VENV)/installed
	@$(ACTIVATE) python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/installed
	@$(ACTIVATE) ruff check . && ruff format --check .

$(VENV)/installed: requirements.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@
