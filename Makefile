# `make demo` and `make test` need nothing but Python 3.10+ and the package index.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
WORKERS ?= 2
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
BIN = $(VENV)/bin
# Alone: a cluster needs the cores, and Ray reads its settings when it is first imported
RAY_TESTS = tests/cluster/test_ray.py tests/test_ray_serve.py

.PHONY: demo test check fix bench fuzz results matrix docs clean

demo: $(VENV)/.installed
	$(BIN)/taskres demo
	@echo "The same with a public CLIP and public photographs, from the Hub: $(BIN)/taskres demo --hub"

test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell
	$(PYTEST) --cov --cov-report=term
	TASKRES_TEST_RAY=1 $(BIN)/python -m pytest $(RAY_TESTS)

# Only the tests, for work on the code: make check TESTS=tests/data
TESTS ?= tests
check: $(VENV)/.installed-dev
	$(PYTEST) $(TESTS)

fix: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks

# Damaged files, kills, full disks, races and long runs: the figures of docs/reliability.md, in about an hour
fuzz: $(VENV)/.installed-dev
	$(BIN)/python -m fuzz --all
	$(BIN)/python -m fuzz full small_disk kills races soak

# The documentation as a site in site/; `make docs SERVE=1` shows it while it is written
SERVE ?=
docs: $(VENV)/.installed-dev
	$(BIN)/python docs/figures.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs $(if $(SERVE),serve,build --strict)

# The tables of docs/results.md: photographs first, where TASKRES_PHOTOS leads to them
results: $(VENV)/.installed
	$(BIN)/python -m benchmarks.results

# The tests on the lowest and the newest core packages, on every Python found, with and without torchvision; each set is
# an environment of its own below .matrix (gigabytes). A part: make matrix MATRIX="--python 3.11 --set lowest" TESTS=...
MATRIX ?=
matrix:
	$(PYTHON) tests/matrix.py $(MATRIX) -- $(TESTS)

# torch first: it decides which build (CPU or CUDA) everything else meets.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)"
	PYTHONWARNINGS=ignore $(BIN)/pip install --quiet -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	PYTHONWARNINGS=ignore $(BIN)/pip install --quiet -e ".[dev,docs,plots,report,heif,openvino,onnx,lora,serve,app,ray]"
	touch $@

clean:
	rm -rf $(VENV) .matrix build dist *.egg-info .coverage* .mypy_cache .ruff_cache .pytest_cache
