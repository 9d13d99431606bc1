# Every target does its own set-up in .venv, from constraints.txt.
PYTHON ?= python3.11
VENV ?= .venv
export HF_HUB_OFFLINE = 1

.PHONY: demo test lint clean

demo: $(VENV)/.installed
	$(VENV)/bin/python scripts/rooms_demo.py $(DEMO_OPTIONS)

test: $(VENV)/.installed
	$(VENV)/bin/python -m pytest -q -n 2

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# Written last, so that an interrupted installation is done again.
$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q -c constraints.txt -e ".[train,test,dev]"
	touch $@

clean:
	rm -rf $(VENV) outputs
