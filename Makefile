VENV ?= .venv
export VENV PYTHON TORCH_INDEX

.PHONY: setup demo test coverage lint

setup:
	@bash tools/setup.sh

demo: setup  ## fetch and convert a small real model, serve it, ask it a question
	@$(VENV)/bin/python examples/demo.py $(DEMO_ARGS)

# In the order of the files, of which the longest are the first: sorted by their numbers of tests
# they would be the last.
PYTEST = $(VENV)/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

test: setup lint  ## everything that needs no GPU
	@$(PYTEST)

coverage: setup  ## the same tests, and the lines that none of them runs
	@$(PYTEST) --cov --cov-report=term-missing:skip-covered

lint: setup
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy
