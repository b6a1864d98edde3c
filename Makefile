# Two commands, each of which does its own set-up: `make run TASK="…"` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
TORCH_CPU := torch==2.13.0+cpu
ROOMS := kernels traces engine tools agent

.PHONY: run test lint types clean
run: $(VENV)/installed bubblewrap
	@$(BIN)/thinkloop run $${TASK:+"$$TASK"}

test: $(VENV)/dev bubblewrap chromium lint types
	$(BIN)/python -m pytest -m "not slow and not gpu"

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy doesn't follow an editable install into renamed folders: it reads the house through links.
types: $(VENV)/dev
	@rm -rf $(VENV)/house && mkdir -p $(VENV)/house/thinkloop
	@for room in $(ROOMS); do ln -s "$(CURDIR)/$$room" $(VENV)/house/thinkloop/$$room; done
	@for file in thinkloop/*; do ln -s "$(CURDIR)/$$file" $(VENV)/house/thinkloop/; done
	MYPYPATH=$(VENV)/house $(BIN)/mypy -p thinkloop

$(VENV)/installed: pyproject.toml
	@$(PYTHON) -m venv $(VENV) 2>/dev/null || { $(SUDO) apt-get update -qq && $(SUDO) apt-get install -y -qq python3-venv && $(PYTHON) -m venv $(VENV); }
	@echo "Installing thinkloop into $(VENV) (the first time takes a minute or two)"
	@[ -e /proc/driver/nvidia/version ] || $(BIN)/pip install -q "$(TORCH_CPU)" 2>/dev/null \
		|| $(BIN)/pip install -q "$(TORCH_CPU)" --index-url https://download.pytorch.org/whl/cpu
	@$(BIN)/pip install -q -e .
	@touch $@

$(VENV)/dev: $(VENV)/installed
	@$(BIN)/pip install -q -e ".[dev]"
	@touch $@

.PHONY: bubblewrap
bubblewrap:
	@command -v bwrap >/dev/null || { $(SUDO) apt-get update -qq && $(SUDO) apt-get install -y -qq bubblewrap; }

.PHONY: chromium
chromium:
	@command -v chromium >/dev/null || { $(SUDO) apt-get update -qq && $(SUDO) apt-get install -y -qq chromium; }

clean:
	rm -rf $(VENV) build *.egg-info
