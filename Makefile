# Every target does its own set-up, usually in .venv with constraints.txt.
PYTHON ?= python3.11
VENV ?= .venv
CONSTRAINTS ?= -c constraints.txt
EXTRAS ?= train,ray,test,dev
export HF_HUB_OFFLINE = 1

.PHONY: demo test test-slow test-oldest test-versions test-vision install-vision lint dist clean

demo: $(VENV)/.installed
	$(VENV)/bin/python scripts/rooms_demo.py $(DEMO_OPTIONS)

test: $(VENV)/.installed
	$(VENV)/bin/python -m pytest -q -n 2 -m "not slow" $(PYTEST_OPTIONS)

# trainings that are killed, Ray, launchers, compilation
test-slow:
	$(MAKE) test PYTEST_OPTIONS="-m slow"

# the oldest Transformers that is supported
test-oldest:
	$(MAKE) test VENV=$(VENV)-oldest CONSTRAINTS="-c constraints.txt transformers==5.17.0"

test-versions: test test-oldest

# the tests that need torchvision and timm, in a separate environment
VISION = VENV=$(VENV)-vision CONSTRAINTS="-c constraints-vision.txt" EXTRAS=vision,timm,test

test-vision:
	$(MAKE) test $(VISION) PYTEST_OPTIONS="-m vision"

install-vision:
	$(MAKE) $(VENV)-vision/.installed $(VISION)

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# Wheel and sdist, each tried in a clean environment.
dist: $(VENV)/.installed
	rm -rf dist
	$(VENV)/bin/python -m build
	set -e; for file in dist/*; do \
		rm -rf $(VENV)-dist; $(PYTHON) -m venv $(VENV)-dist; \
		$(VENV)-dist/bin/pip install -q $(CONSTRAINTS) "./$$file[test]"; \
		$(VENV)-dist/bin/pip check; \
		$(VENV)-dist/bin/python -m pytest -q $(addprefix tests/,test_configuration_degmix.py test_pipeline_degmix.py hub/test_model_card.py hub/test_shipped.py); \
		$(VENV)-dist/bin/python scripts/rooms_demo.py --quick --output_dir outputs/dist-demo; \
	done

# Written last, so that an interrupted installation is repeated.
$(VENV)/.installed: setup.cfg pyproject.toml $(wildcard constraints*.txt)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q $(CONSTRAINTS) -e ".[$(EXTRAS)]"
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-* outputs dist build
