# Everything sets itself up: a virtual environment in .venv with the pinned versions of constraints.txt.
PYTHON ?= python3
SETUP := .venv/.installed
RUN := .venv/bin/python

# Without what they ask for: torchvision beside torch for CPUs breaks Lightning, and others hold numpy back.
READERS := litdata==0.2.76 mosaicml-streaming==0.13.0 brotli catalogue cramjam python-snappy zstd

# Likewise: torchvision is there to be imported, and computes nothing.
FIDELITY := torch-fidelity==0.4.0 torchvision==0.28.0

.PHONY: demo test lint tests gpu bench hard ladder readers parity clean

demo: $(SETUP)
	.venv/bin/smalti run configs/digits.yaml
	$(RUN) benchmarks/digits.py runs/digits
	@echo "look at runs/digits/samples/grid.png and runs/digits/tokenizer/reconstructions.png"

test: lint tests

lint: $(SETUP)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

tests: $(SETUP)
	.venv/bin/pytest -n 2 --dist worksteal

# Under ten minutes on a machine with a CUDA GPU; writes benchmarks/results/NAME-OF-THE-GPU.json.
gpu: $(SETUP)
	$(RUN) -m benchmarks.gpu

# Half an hour, best on a machine that does nothing else; writes benchmarks/README.md.
bench: $(SETUP)
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(RUN) -m benchmarks

# What takes too long for `make test`: SIGKILL a hundred times, ten thousand mutated files.
hard: $(SETUP)
	$(RUN) tests/hard/kills.py
	$(RUN) tests/hard/fuzz.py

# Every latent model on the digits, half an hour on two cores; goes on where it was stopped. Writes docs/ladder.md.
ladder: $(SETUP)
	$(RUN) -m benchmarks.ladder

# Exported tokens through the libraries that do not go with ours, in an environment that finds the rest in .venv.
readers: $(SETUP)
	$(RUN) -m venv .venv-readers
	$(RUN) -c 'import site; print(site.getsitepackages()[0])' > $$(echo .venv-readers/lib/python3*/site-packages)/ours.pth
	.venv-readers/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(READERS) \
		|| { echo "cannot install $(READERS): nothing was read; look at what pip says above"; exit 1; }
	.venv-readers/bin/python -m tests.readers.read

# FID, KID, precision and recall beside torch-fidelity's, of the same images; IMAGES names a folder of packed ones.
parity: $(SETUP)
	$(RUN) -m venv .venv-parity
	$(RUN) -c 'import site; print(site.getsitepackages()[0])' > $$(echo .venv-parity/lib/python3*/site-packages)/ours.pth
	.venv-parity/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(FIDELITY) \
		|| { echo "cannot install $(FIDELITY): nothing was compared; look at what pip says above"; exit 1; }
	.venv-parity/bin/python -m tests.parity.fidelity $(IMAGES)

$(SETUP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "smalti needs Python 3.11 or newer"'
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $(SETUP)

clean:
	rm -rf .venv .venv-readers .venv-parity runs build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
