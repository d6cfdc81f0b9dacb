# Two commands matter, each alone on a fresh clone: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
MEMBERS := plugins/kbit plugins/spqr plugins/autoround plugins/qtip plugins/binary
READY := $(VENV)/.ready
ORACLES := $(VENV)/.oracles

.PHONY: demo test lint types pytest test-oracles test-gpu bench-smoke bench matrix picture clean

demo: $(READY)  ## convert a real language model and show what it costs
	$(RUN) bench/demo.py

test: lint types pytest  ## everything that runs on a CPU, under ten minutes

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: $(READY)
	$(RUN) -m mypy

pytest: $(READY)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 --dist worksteal -p no:benchmark -m "not network" --ignore=tests/oracles

test-oracles: $(ORACLES)  ## checks against software that others wrote, on a real model
	$(RUN) -m pytest -q tests/oracles

test-gpu:  ## the kernels on an NVIDIA GPU, with whatever Python has torch, pytest and cuda-core there
	PYTHONPATH=core:cuda:formats:plugins/kbit:plugins/binary $(PYTHON) -m pytest -q -p no:cacheprovider -m cuda tests/cuda plugins/kbit plugins/binary

bench-smoke: $(READY)  ## every benchmark once, without timing, and the gate on machine-independent figures
	$(RUN) -m pytest -q bench --benchmark-disable

bench: $(READY)  ## benchmarks with timing; see bench/README.md
	$(RUN) -m pytest bench --benchmark-only --benchmark-columns=median,iqr,rounds --benchmark-sort=name

matrix: $(READY)  ## write the current matrix into the README
	$(RUN) bench/update_matrix.py

picture: $(READY)  ## run the demo and keep its table as bench/demo.svg
	$(RUN) bench/demo.py --picture bench/demo.svg

# The build tools go in first, so that the six editable distributions need no build environment each.
$(READY): constraints.txt pyproject.toml $(MEMBERS:%=%/pyproject.toml)
	$(PYTHON) -c 'import sys; sys.exit("lowbit needs Python 3.10 or newer, this is %d.%d; try make PYTHON=python3.12" % sys.version_info[:2] if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --disable-pip-version-check -q -c constraints.txt hatchling editables
	$(RUN) -m pip install --disable-pip-version-check -q -c constraints.txt --no-build-isolation -e ".[all,hf,gpu,plot,test]" $(MEMBERS:%=-e %)
	@touch $@

$(ORACLES): $(READY) tests/oracles/requirements.txt tests/oracles/requirements-gptqmodel.txt
	$(RUN) -m pip install --disable-pip-version-check -q --no-deps -c constraints.txt -r tests/oracles/requirements.txt
	rm -rf $(VENV)/gptqmodel
	$(RUN) -m pip install --disable-pip-version-check -q --no-deps --target $(VENV)/gptqmodel -r tests/oracles/requirements-gptqmodel.txt
	@touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks
