# make demo: from the embedded teacher to a device artifact and its table      make test: the whole test suite
# Both make .venv and install first. PYTHON=... picks the interpreter (3.11 or newer), VENV=... the environment's folder.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
FLASHGEN := $(BIN)/flashgen
INSTALLED := $(VENV)/.installed
DEMO := artifacts/demo
SHAPES := artifacts/shapes
RECIPE := --recipe shapes-demo
PROMPT := two red circles on a white background

.PHONY: install demo shapes ablation compression fullsize healthy-run test check teacher clean distclean

install: $(INSTALLED)

# The lock has hashes; its head says why torch is not in it.
$(INSTALLED): pyproject.toml requirements/ci.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --require-hashes --no-deps -r requirements/ci.txt
	$(BIN)/pip install torch==2.13.0
	$(BIN)/pip install --no-build-isolation --no-deps -e .
	$(BIN)/pip check
	touch $@

# Every stage says "up to date" when its inputs, recipe and seed are those of the last run, and resumes when it was interrupted.
demo: install
	$(FLASHGEN) distill shapes $(RECIPE) --out $(DEMO)/student
	$(FLASHGEN) finetune $(DEMO)/student $(RECIPE) --out $(DEMO)/finetuned
	$(FLASHGEN) restructure-encoder $(DEMO)/finetuned --mode prune $(RECIPE) --out $(DEMO)/slim
	$(FLASHGEN) quantize $(DEMO)/slim $(RECIPE) --out $(DEMO)/int4
	$(FLASHGEN) export $(DEMO)/int4 $(RECIPE) --out $(DEMO)/device
	$(FLASHGEN) export $(DEMO)/slim $(RECIPE) --out $(DEMO)/device-fp32
	$(FLASHGEN) generate $(DEMO)/device "$(PROMPT)" --seed 1 --out $(DEMO)/picture.png
	$(FLASHGEN) bench shapes $(DEMO)/student $(DEMO)/slim $(DEMO)/device $(RECIPE) --set bench.per_task=60 --out $(DEMO)/bench
	$(BIN)/python -m benchmarks.bars $(DEMO)

# The numbers that we report on the embedded world: four steps with and without finetune, two steps, eight. Two hours at most.
shapes: install
	$(FLASHGEN) distill shapes --recipe shapes --out $(SHAPES)/student
	$(FLASHGEN) finetune $(SHAPES)/student --recipe shapes --out $(SHAPES)/finetuned
	$(FLASHGEN) distill shapes --recipe shapes-2 --out $(SHAPES)/student-2
	$(FLASHGEN) distill shapes --recipe shapes-8 --out $(SHAPES)/student-8
	$(BIN)/python -m benchmarks.shapes $(SHAPES)

# docs/ablation.md, .json and .png; every finished run is kept, so the same command goes on. Three hours at most.
ablation: install
	$(BIN)/python -m benchmarks.ablation artifacts/ablation --page docs/ablation.md

# docs/compression.md, .json and .png: encoders and weights of `make shapes`' student beside other people's quantizers. Resumes.
compression: shapes
	$(BIN)/pip install --no-build-isolation -e ".[peers]"
	$(BIN)/python -m benchmarks.compression $(SHAPES) --page docs/compression.md

# docs/fullsize.md and .json: SD3.5-Medium's shapes through every stage, 40 GB of disk. Resumes row by row.
fullsize: install
	$(BIN)/python -m benchmarks.fullsize artifacts/fullsize --page docs/fullsize.md

# The curves of docs/healthy-run.md, from the student of `make shapes`.
healthy-run: install
	$(FLASHGEN) distill shapes --recipe shapes --out $(SHAPES)/student
	for run in healthy-run failure-saturation failure-proxy-lag failure-discriminator; do \
		$(FLASHGEN) finetune $(SHAPES)/student --recipe $$run --out artifacts/healthy/$$run || exit; done
	$(BIN)/python -m benchmarks.healthy artifacts/healthy docs/healthy-run.png

test: install
	$(BIN)/pytest

# The same as CI.
check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest

# The embedded teacher from nothing: autoencoder, text encoders, transformer; an hour or two. Resumes when interrupted.
teacher: install
	$(FLASHGEN) teacher train --recipe shapes --out artifacts/teacher

clean:
	rm -rf $(DEMO) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
	find flashgen tests -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
