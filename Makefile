# Every target does its own set-up in .venv, from constraints.txt.
PYTHON ?= python3.11
VENV ?= .venv
CONSTRAINTS ?= -c constraints.txt
export HF_HUB_OFFLINE = 1

.PHONY: demo test test-oldest lint clean

demo: $(VENV)/.installed
	$(VENV)/bin/python scripts/rooms_demo.py $(DEMO_OPTIONS)

test: $(VENV)/.installed
	$(VENV)/bin/python -m pytest -q -n 2

# the oldest Transformers that is supported
test-oldest:
	$(MAKE) test VENV=$(VENV)-oldest CONSTRAINTS="-c constraints.txt transformers==5.17.0"

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# Written last, so that an interrupted installation is done again.
$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q $(CONSTRAINTS) -e ".[train,test,dev]"
	touch $@

clean:
	rm -rf $(VENV) outputs
