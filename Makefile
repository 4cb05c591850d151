# make demo: from the embedded teacher to a device artifact and its table      make test: the whole test suite
# Both make .venv and install first. PYTHON=... picks the interpreter (3.11 or newer), VENV=... the environment's folder.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
FLASHGEN := $(BIN)/flashgen
INSTALLED := $(VENV)/.installed
DEMO := artifacts/demo
SHAPES := artifacts/shapes
PEERS := .venv-peers
LOWEST := .venv-lowest
AUDIT := .venv-audit
RECIPE := --recipe shapes-demo
INT4 := --set quantize.method=gptq --set quantize.group=16 --set quantize.low_rank_tolerance=0.003
PROMPT := two red circles on a white background

# A student of one minute of training: other loaders and another processor are tested with it, not its quality.
INTERCHANGE := artifacts/interchange
QUICK := $(RECIPE) --set bench.per_task=1 --set distill.trajectory.prompts=128 --set distill.trajectory.iterations=60 \
	--set distill.matching.iterations=0 --set restructure.prompts=64 --set restructure.iterations=10 --set restructure.floor=0
ARM64 := artifacts/arm64
WHEELS := --target $(ARM64)/site --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux2014_aarch64 \
	--python-version 3.11 --only-binary=:all:

.PHONY: install demo shapes ablation compression bench-device bench-decode bench-gpu bench-job fullsize browser healthy-run interchange test-interchange test-arm64 test-mobile
.PHONY: crash-test load-test mutations test test-js check teacher clean distclean

install: $(INSTALLED)

# The lock has hashes; its first lines say why torch is not in it.
$(INSTALLED): pyproject.toml requirements/ci.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --require-hashes --no-deps -r requirements/ci.txt
	$(BIN)/pip install torch==2.13.0
	$(BIN)/pip install --no-build-isolation --no-deps -e .
	$(BIN)/pip check
	touch $@

# Every stage is "up to date" when inputs, recipe and seed equal those of the last run, and resumes when it was interrupted.
demo: install
	$(FLASHGEN) distill shapes $(RECIPE) --out $(DEMO)/student
	$(FLASHGEN) finetune $(DEMO)/student $(RECIPE) --out $(DEMO)/finetuned
	$(FLASHGEN) restructure-encoder $(DEMO)/finetuned --mode prune $(RECIPE) --out $(DEMO)/slim
	$(FLASHGEN) quantize $(DEMO)/slim $(RECIPE) $(INT4) --out $(DEMO)/int4
	$(FLASHGEN) export $(DEMO)/int4 $(RECIPE) --out $(DEMO)/device
	$(FLASHGEN) export $(DEMO)/slim $(RECIPE) --out $(DEMO)/device-fp32
	$(FLASHGEN) generate $(DEMO)/device "$(PROMPT)" --seed 1 --out $(DEMO)/picture.png
	$(FLASHGEN) bench shapes $(DEMO)/student $(DEMO)/finetuned $(DEMO)/slim $(DEMO)/device $(RECIPE) --set bench.per_task=60 --out $(DEMO)/bench
	$(BIN)/python -m benchmarks.bars $(DEMO)

# The reported numbers on the embedded world (docs/results.md): four steps with and without finetune (95 minutes on two cores with AVX-512), two steps (75 more), eight (36).
shapes: install
	$(FLASHGEN) distill shapes --recipe shapes --out $(SHAPES)/student
	$(FLASHGEN) finetune $(SHAPES)/student --recipe shapes --out $(SHAPES)/finetuned
	$(FLASHGEN) distill shapes --recipe shapes-2 --set distill.start=$(SHAPES)/finetuned --out $(SHAPES)/student-2
	$(FLASHGEN) distill shapes --recipe shapes-8 --out $(SHAPES)/student-8
	$(FLASHGEN) restructure-encoder $(SHAPES)/finetuned --mode prune --recipe shapes --out $(SHAPES)/slim
	$(FLASHGEN) quantize $(SHAPES)/slim --recipe shapes --out $(SHAPES)/int4
	$(FLASHGEN) export $(SHAPES)/int4 --recipe shapes --out $(SHAPES)/device
	$(BIN)/python -m benchmarks.shapes $(SHAPES)

# docs/ablation.md, .json and .png; finished runs are kept, so the same command resumes. Three hours at most.
ablation: install
	$(BIN)/python -m benchmarks.ablation artifacts/ablation --page docs/ablation.md

# docs/compression.md, .json and .png: encoders and weights of the student of `make shapes`, compared with other quantizers. Resumes.
compression: shapes $(PEERS)/.installed
	$(PEERS)/bin/python -m benchmarks.compression $(SHAPES) --page docs/compression.md

# Other people's quantizers, on top of what $(VENV) has; nncf is not in the lock, for only the tables use it.
$(PEERS)/.installed: $(INSTALLED)
	$(PYTHON) -m venv $(PEERS)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > "$$($(PEERS)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/flashgen.pth"
	$(PEERS)/bin/pip install "nncf>=2.17"
	touch $@

# docs/device-KIND.md and .json, KIND being the processor's (amx, vnni, avx2, arm): one step at SD3.5-Medium's width on every engine. Half an hour on a machine that runs nothing else.
bench-device: $(PEERS)/.installed
	$(PEERS)/bin/python -m benchmarks.device artifacts/device-bench

# docs/decode.md and .json: the VAE against the tiny decoder at SD3.5-Medium's size. A quarter of an hour on a machine that runs nothing else.
bench-decode: install
	$(BIN)/pip install --no-build-isolation -e ".[openvino]"
	OMP_NUM_THREADS=2 $(BIN)/python -m benchmarks.decode artifacts/decode-bench --page docs/decode.md

# docs/gpu.md and .json: speed, memory and agreement of a GPU; ten minutes. ARGS=--tiny tests the script on a CPU and writes elsewhere.
bench-gpu: install
	$(BIN)/python -m benchmarks.gpu $(ARGS)

# docs/job-KIND.md and .json: from prompt to PNG, whole processes; needs make fullsize and make shapes. An hour and a half the first time,
# which also compiles stable-diffusion.cpp.
bench-job: $(PEERS)/.installed
	CMAKE_ARGS=-DGGML_NATIVE=ON $(PEERS)/bin/pip install --no-deps stable-diffusion-cpp-python
	OMP_NUM_THREADS=2 $(PEERS)/bin/python -m benchmarks.job artifacts/fullsize $(SHAPES)

# docs/fullsize.md and .json: SD3.5-Medium's shapes through every stage; needs 40 GB of disk. Resumes row by row.
fullsize: install
	$(BIN)/python -m benchmarks.fullsize artifacts/fullsize --page docs/fullsize.md

# The curves of docs/healthy-run.md, from the student of `make shapes`.
healthy-run: install
	$(FLASHGEN) distill shapes --recipe shapes --out $(SHAPES)/student
	for run in healthy-run failure-saturation failure-fake-score-lag failure-discriminator; do \
		$(FLASHGEN) finetune $(SHAPES)/student --recipe $$run --out artifacts/healthy/$$run || exit; done
	$(BIN)/python -m benchmarks.healthy artifacts/healthy docs/healthy-run.png

# The web page in headless Chromium (Debian: apt-get install chromium): its tests, then its speed, and its pictures compared with Python's.
browser: install
	$(BIN)/pip install --no-build-isolation -e ".[web]"
	$(FLASHGEN) distill shapes $(RECIPE) --out $(DEMO)/student
	$(FLASHGEN) quantize $(DEMO)/student --recipe device-web --out $(DEMO)/int4-web
	$(FLASHGEN) export $(DEMO)/int4-web --target web --recipe device-web --out $(DEMO)/web
	$(BIN)/pytest -m browser -rs
	$(BIN)/python -m benchmarks.browser $(DEMO)/web

interchange: install
	$(FLASHGEN) distill shapes $(QUICK) --out $(INTERCHANGE)/student
	$(FLASHGEN) restructure-encoder $(INTERCHANGE)/student --mode prune $(QUICK) --out $(INTERCHANGE)/slim
	$(FLASHGEN) quantize $(INTERCHANGE)/student $(QUICK) --out $(INTERCHANGE)/int4
	$(FLASHGEN) quantize $(INTERCHANGE)/slim $(QUICK) --out $(INTERCHANGE)/slim-int4
	$(FLASHGEN) export $(INTERCHANGE)/student $(QUICK) --out $(INTERCHANGE)/device-fp32
	$(FLASHGEN) export $(INTERCHANGE)/int4 $(QUICK) --out $(INTERCHANGE)/device
	$(FLASHGEN) export $(INTERCHANGE)/int4 $(QUICK) --set export.accuracy_level=4 --out $(INTERCHANGE)/device-int8
	$(FLASHGEN) export $(INTERCHANGE)/slim-int4 $(QUICK) --out $(INTERCHANGE)/slim-device

# optimum (in an environment of its own) and diffusers must draw the same pictures from the folders and from the GGUF.
test-interchange: interchange $(INTERCHANGE)/venv/.installed
	$(FLASHGEN) export $(INTERCHANGE)/student $(QUICK) --target gguf --out $(INTERCHANGE)/student-gguf
	$(FLASHGEN) export $(INTERCHANGE)/int4 $(QUICK) --target gguf --out $(INTERCHANGE)/int4-gguf
	$(BIN)/python -m benchmarks.interchange loaders $(INTERCHANGE) $(INTERCHANGE)/venv/bin/python

$(INTERCHANGE)/venv/.installed: requirements/interchange.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install -r $<
	touch $@

# The aarch64 wheels of the base install in Debian's arm64 Python, which is only unpacked: qemu runs it; no chroot, binfmt or root is needed.
test-arm64: interchange $(ARM64)/.made
	$(BIN)/python -m benchmarks.interchange arm64 $(INTERCHANGE) $(ARM64)

$(ARM64)/.made: pyproject.toml requirements/ci.txt
	@for tool in mmdebstrap qemu-aarch64-static; do command -v $$tool > /dev/null || \
		{ echo "$$tool is not installed: apt-get install mmdebstrap qemu-user-static"; exit 5; }; done
	rm -rf $(ARM64)
	mkdir -p $(ARM64)
	mmdebstrap --variant=extract --architectures=arm64 --include=python3,libstdc++6 bookworm $(ARM64)/root
	grep -oE '^[A-Za-z0-9_.-]+==[^ ]+' requirements/ci.txt > $(ARM64)/constraints.txt
	$(BIN)/pip install --no-build-isolation $(WHEELS) -c $(ARM64)/constraints.txt .
	rm -rf $(ARM64)/site/flashgen
	touch $@

# The usability check of onnxruntime for phones, and pictures from its .ort format.
test-mobile: interchange
	$(BIN)/python -m benchmarks.interchange mobile $(INTERCHANGE)

test: install
	$(BIN)/pytest

# docs/mutations.json: files of tiny artifacts are damaged in 1,265 ways and read; half an hour.
mutations: install
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.mutations artifacts/mutations --page docs/mutations.json

# docs/crash.json: every stage killed at random moments and at every step of publishing, on full disks and so on; resumes. About two hours.
crash-test: install
	$(BIN)/python -m benchmarks.crash artifacts/crash --page docs/crash.json

# docs/load.json: 20,000 prompts, interrupted and resumed; 1,000 pictures in one process; 200 raters at once. Half an hour.
load-test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.load artifacts/load

# The web page's arithmetic in node; package.json only says that its .js are modules. `make browser` tests the page itself.
test-js:
	@command -v node > /dev/null || { echo "node is not installed: apt-get install nodejs"; exit 5; }
	node --test tests/js/*.test.mjs

# The same as CI. Tiny networks gain little from a second thread, so two processes share the tests.
check: install test-js
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

# The tests with the lowest versions that pyproject.toml admits; torch alone is that of the lock.
check-lowest: $(LOWEST)/.installed
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -n 2

$(LOWEST)/.installed: $(INSTALLED) requirements/build.in
	rm -rf $(LOWEST)
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/pip install uv
	$(LOWEST)/bin/uv pip compile pyproject.toml requirements/build.in --extra train --extra arena --extra gguf --extra nf4 --extra dev --quiet \
		--resolution lowest-direct --python-version 3.11 --no-annotate --no-header | grep -vE '^(torch|triton|nvidia-.*|cuda-.*)==' > $(LOWEST)/lowest.txt
	$(LOWEST)/bin/uv pip install --python $(LOWEST) --no-deps -r $(LOWEST)/lowest.txt
	site=$$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))") && cd $(LOWEST)/lib/python3*/site-packages \
		&& ln -sfn $$site/torch $$site/torchgen $$site/functorch $$site/torch-*.dist-info .
	touch $@

# docs/fuzz.json: command lines, recipes and manifests with hypothesis, readers with atheris, which is not in the lock. Hours; resumes.
fuzz: install
	$(BIN)/pip install "atheris>=3"
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.fuzz artifacts/fuzz --page docs/fuzz.json

# Known vulnerabilities of what the lock names; asks PyPI.
audit: $(AUDIT)/.installed
	$(AUDIT)/bin/pip-audit --requirement requirements/ci.txt --no-deps --disable-pip --progress-spinner off

# CycloneDX: every package of the lock with its hashes, and torch.
sbom: $(AUDIT)/.installed
	mkdir -p artifacts
	(cat requirements/ci.txt; echo torch==2.13.0) | $(AUDIT)/bin/cyclonedx-py requirements - --pyproject pyproject.toml --output-reproducible \
		-o artifacts/sbom.json

$(AUDIT)/.installed:
	$(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/pip install pip-audit cyclonedx-bom
	touch $@

# The embedded teacher, trained from nothing: autoencoder, text encoders, transformer; one to two hours. Resumes when interrupted.
teacher: install
	$(FLASHGEN) teacher train --recipe shapes --out artifacts/teacher

clean:
	rm -rf $(DEMO) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
	find flashgen tests -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) $(PEERS) $(LOWEST) $(AUDIT)
