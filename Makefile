VENV ?= .venv
export VENV PYTHON TORCH_INDEX

.PHONY: setup demo test lint

setup:
	@bash tools/setup.sh

demo: setup  ## fetch and convert a small real model, serve it, ask it a question
	@$(VENV)/bin/python examples/demo.py $(DEMO_ARGS)

# In the order of the files, of which the longest are the first: sorted by their numbers of tests
# they would be the last.
test: setup lint  ## everything that needs no GPU
	@$(VENV)/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

lint: setup
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy
