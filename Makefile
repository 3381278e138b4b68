# make demo | make test | make test-all | make check | make coverage | make campaign. Each makes .venv when it is not there.
PYTHON ?= python3
BIN = .venv/bin
RUN = runs/quickstart
# Two workers of one thread each (tests/__init__.py); a file's tests stay together, so what they share is made once.
PYTEST = $(BIN)/python -m pytest --numprocesses 2 --dist loadscope

.PHONY: demo test test-all check coverage campaign docs clean distclean
.DELETE_ON_ERROR:

# torch first and pinned: an open range elsewhere would bring another build of it.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch torchvision
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[train,openvino,lint,demo,ssh,dev]'
	touch $@

# A gate that fails (exit code 3) or cannot tell (4) is an answer of an int8 target on this machine;
# the float bundle must not fail (a near tie cannot be told), and anything else is an error.
TARGETS = onnx-int8 onnx-int8-arm openvino-int8 tensorrt-int8

demo: .venv/installed
	$(BIN)/edgeclip distill recipes/quickstart.yaml
	$(BIN)/edgeclip export --run $(RUN) --target onnx-fp32
	$(BIN)/edgeclip validate --bundle $(RUN)/bundles/onnx-fp32 --device host-cpu || [ $$? -eq 4 ]
	for t in $(TARGETS); do $(BIN)/edgeclip export --run $(RUN) --target $$t || [ $$? -eq 3 ] || exit 1; done
	$(BIN)/edgeclip validate --run $(RUN) --device host-cpu; code=$$?; [ $$code -eq 0 ] || [ $$code -eq 3 ] || [ $$code -eq 4 ]
	$(BIN)/edgeclip bench --run $(RUN) --device host-cpu
	$(BIN)/edgeclip report $(RUN)

# minutes: what is marked slow is in test-all
test: .venv/installed
	$(PYTEST) -m "not slow"

test-all: .venv/installed
	$(PYTEST)

# the same tests, and which lines and branches they reach; but for those that leave a process no file
# to write, which coverage.py needs
UNSEEN = tests/cli/test_operating_system.py
coverage: export COVERAGE_FILE = $(CURDIR)/.coverage
coverage: .venv/installed
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest --numprocesses 2 --dist loadscope \
	  --deselect $(UNSEEN)::test_a_disk_that_fills_in_the_middle \
	  --deselect $(UNSEEN)::test_too_many_open_files
	$(BIN)/coverage combine --quiet
	$(BIN)/python benchmarks/covered.py --check --json results/coverage.json

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell .
	$(BIN)/mypy

# hours: every figure of the pages that needs no photos and no board, measured anew on the demo's run
CAMPAIGN = quickstart quickstart_seeds latency parity cold_start harness cache data scale trainer \
    export_matrix footprint emulated install crash pairs damage fuzz leaks

campaign: .venv/installed
	for name in $(CAMPAIGN); do \
	  echo "== $$name"; \
	  $(BIN)/python benchmarks/$$name.py --json results/$$name.json > runs/$$name.log || exit 1; done

# the pages that are generated from the code, and the figures in the others
docs: .venv/installed
	$(BIN)/python docs/generate.py
	$(BIN)/python benchmarks/figures.py

clean:
	rm -rf .venv .data .mypy_cache .ruff_cache .pytest_cache

# and what was trained
distclean: clean
	rm -rf runs cache
