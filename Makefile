# make demo, make test and the others set up what they need in $(VENV), once; nothing outside this folder is touched
# but pip's own cache. A second call finds the stamps in $(VENV) and starts at once.
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
PYTEST_ARGS ?=
JOBS ?= 2
SUITE ?=
export PYDENOISE_CACHE ?= $(CURDIR)/.cache

RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install -qq --disable-pip-version-check -c constraints.txt $(PIP_ARGS)
# Two processes, each with torch's usual threads: an idle thread must sleep, not spin on the core of the other process.
PYTEST := OMP_WAIT_POLICY=PASSIVE $(RUN) -m pytest -q -n $(JOBS) --dist worksteal $(PYTEST_ARGS)
STAMPS := $(VENV)/.stamps
BUILD_INPUTS := $(shell find csrc -type f) setup.py setup_cuda.py pyproject.toml constraints.txt
CPP_FILES := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')
FFDNET := $(PYDENOISE_CACHE)/ffdnet_color.pth
CUNET := $(PYDENOISE_CACHE)/cunet/noise3_model.bin
TERRAIN := $(PYDENOISE_CACHE)/terrain_consistency_unet.onnx
MINILM := $(PYDENOISE_CACHE)/minilm/vocab.txt
WEIGHTS := $(FFDNET) $(CUNET) $(TERRAIN) $(MINILM)
KERNEL_TESTS := tests/kernels

.PHONY: help setup demo test test-slow bench lint format clean
.DELETE_ON_ERROR:

help:
	@echo "make setup      build pydenoise in $(VENV), with torch and everything that tests and benches need"
	@echo "make demo       photographs, heightfields and digits: tables, and pictures in demo/"
	@echo "make test       the test suite in JOBS=2 processes (PYTEST_ARGS='-k tiles' and the like are passed on)"
	@echo "make test-slow  the tests that take long or need much memory"
	@echo "make bench      time everything (SUITE=unet or another: only that)"
	@echo "make lint       ruff and clang-format: check;  make format: rewrite"
	@echo "make clean      remove build products, $(VENV) and downloaded files stay"

setup: $(STAMPS)/test $(STAMPS)/bench $(WEIGHTS)

# torch first: the build reads its headers, so it cannot come in the same pip command as pydenoise.
$(STAMPS)/torch: constraints.txt
	@echo "setting up $(VENV) with torch (some minutes the first time)"
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@$(PIP) torch numpy setuptools pybind11
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/built: $(STAMPS)/torch $(BUILD_INPUTS)
	@echo "building pydenoise"
	@$(PIP) --no-build-isolation --no-deps --editable .
	@touch $@

# pydenoise itself is installed by now: these add the packages of an extra and build nothing.
$(STAMPS)/demo $(STAMPS)/test $(STAMPS)/bench: $(STAMPS)/%: $(STAMPS)/built
	@echo "installing the packages for: $*"
	@$(PIP) "pydenoise[$*]"
	@touch $@

$(FFDNET): MODEL := ffdnet
$(CUNET): MODEL := cunet
$(TERRAIN): MODEL := terrain
$(MINILM): MODEL := minilm
$(WEIGHTS): | $(STAMPS)/built
	@$(RUN) -m pydenoise weights $(MODEL)

demo: $(STAMPS)/demo $(FFDNET) $(TERRAIN)
	@$(RUN) -m pydenoise demo

# Triton reads TRITON_INTERPRET when a kernel is defined, so the kernels have a process of their own. Both runs are
# made whatever the first one says, and pytest's closing line comes last.
test: $(STAMPS)/test $(WEIGHTS)
	@status=0; \
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PYTEST) $(KERNEL_TESTS) || status=$$?; \
	$(PYTEST) --ignore=$(KERNEL_TESTS) || status=$$?; \
	exit $$status

test-slow: $(STAMPS)/test $(WEIGHTS)
	@status=0; \
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PYTEST) -m slow $(KERNEL_TESTS) || status=$$?; \
	test $$status != 5 || status=0; \
	$(PYTEST) -m slow --ignore=$(KERNEL_TESTS) || status=$$?; \
	exit $$status

bench: $(STAMPS)/bench
	@$(RUN) -m pydenoise bench $(SUITE)

lint: $(STAMPS)/test
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(VENV)/bin/clang-format --dry-run --Werror $(CPP_FILES)

format: $(STAMPS)/test
	@$(RUN) -m ruff check --fix .
	@$(RUN) -m ruff format .
	@$(VENV)/bin/clang-format -i $(CPP_FILES)

clean:
	@rm -rf build dist demo bench/out .pytest_cache .ruff_cache .hypothesis .benchmarks *.egg-info
	@find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
	@rm -f pydenoise/*.so $(STAMPS)/built
