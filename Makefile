# make run    the walkthrough for one GPU, into runs/<gpu>/index.html
# make test   everything that CI checks
# Both set up .venv by themselves, from the hash-pinned locks; nothing is installed elsewhere.

GPU ?=
SCENARIO ?=
NOTEBOOKS ?=
ARGS ?=
PORT ?= 8888

VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# The first Python on PATH that is new enough and can make a virtual environment with pip in it.
USABLE := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
CANDIDATES := $(PYTHON) python3.13 python3.12 python3.11 python3 python
FIND_PYTHON = for p in $(CANDIDATES); do "$$p" -c "$(USABLE)" >/dev/null 2>&1 && { echo "$$p"; break; }; done

.DEFAULT_GOAL := help
.PHONY: help setup run test test-engines engine agents test-agents lint notebooks bundles deploy-tools test-deploy lab lock lock-engines lock-agents lock-deploy clean

help:
	@echo "make run        the walkthrough for one GPU (GPU=h200-sxm-141gb, SCENARIO=file.yaml, NOTEBOOKS=00,02)"
	@echo "make test       lint, unit tests, doctests, notebooks"
	@echo "make engine     a real engine in .engines (ENGINE=vllm or sglang): CUDA with an NVIDIA GPU, else CPU"
	@echo "make test-engines  the tests that start those engines"
	@echo "make agents     LangGraph, CrewAI and AutoGen in .venv-agents"
	@echo "make test-agents  the tests that run agents of the three"
	@echo "make setup      .venv with the kit command and the notebooks"
	@echo "make lint       ruff, mypy, size of kit/"
	@echo "make notebooks  build notebooks/*.ipynb from notebooks/src/*.py"
	@echo "make bundles    render docker/* from docker/templates"
	@echo "make test-deploy   a bundle's nginx, Prometheus, Alertmanager and routers before emulators"
	@echo "make lab        the notebooks in JupyterLab, opened at 00 (PORT=8888, or the next free one)"
	@echo "make lock       resolve requirements/*.lock anew"

$(BIN)/python:
	@found=$$($(FIND_PYTHON)); \
	if [ -z "$$found" ]; then \
	  echo "No Python >= 3.11 with the venv module on PATH (Debian and Ubuntu: apt-get install python3-venv); or name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; \
	  exit 1; \
	fi; \
	echo "Setting up $(VENV) with $$found ($$("$$found" --version))" >&2; \
	"$$found" -m venv $(VENV)

# Each stamp is newer than the lock it was installed from, so a second call does nothing.
# dev.lock holds every line of notebooks.lock, so it satisfies both.
INSTALL_KIT = $(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .

$(VENV)/.notebooks: requirements/notebooks.lock pyproject.toml | $(BIN)/python
	@echo "Installing requirements/notebooks.lock" >&2
	@$(BIN)/python -m pip install --quiet --require-hashes -r requirements/notebooks.lock
	@$(INSTALL_KIT)
	@touch $@

$(VENV)/.dev: requirements/dev.lock pyproject.toml | $(BIN)/python
	@echo "Installing requirements/dev.lock" >&2
	@$(BIN)/python -m pip install --quiet --require-hashes -r requirements/dev.lock
	@$(INSTALL_KIT)
	@touch $@ $(VENV)/.notebooks

setup: $(VENV)/.notebooks

run: $(VENV)/.notebooks
	@$(BIN)/kit run $(if $(GPU),--gpu $(GPU)) $(if $(SCENARIO),--scenario $(SCENARIO)) \
	  $(if $(NOTEBOOKS),--notebooks $(NOTEBOOKS)) $(ARGS)

test: lint
	@$(BIN)/python -m pytest -n 2 --dist loadfile tests kit
	@$(BIN)/python -m pytest -n 2 --dist loadfile --nbval-lax --nbval-current-env \
	  --nbval-cell-timeout=120 notebooks/*.ipynb notebooks/solutions/*.ipynb

# Each engine has an environment of its own: their torch pins exclude each other and the notebooks'.
engine:
	@requirements/engine.sh "$(ENGINE)" "$$($(FIND_PYTHON))"

test-engines: $(VENV)/.dev
	@$(BIN)/python -m pytest -m engine -rs --durations=0 tests/engines tests/agents

# The frameworks of notebook 10 in an environment of their own: what they pull in is theirs.
AGENTS := .venv-agents
$(AGENTS)/.agents: requirements/agents.lock
	@echo "Installing requirements/agents.lock into $(AGENTS)" >&2
	@"$$($(FIND_PYTHON))" -m venv $(AGENTS)
	@$(AGENTS)/bin/python -m pip install --quiet --require-hashes -r requirements/agents.lock
	@touch $@

agents: $(AGENTS)/.agents

test-agents: $(VENV)/.dev
	@$(BIN)/python -m pytest -m agents -rs --durations=0 tests/agents

lint: $(VENV)/.dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python tests/code_lines.py

notebooks: $(VENV)/.dev
	@$(BIN)/python notebooks/build.py $(ARGS)

bundles: $(VENV)/.dev
	@$(BIN)/python docker/render.py

# What reads or runs parts of a bundle, each in an environment of its own; nginx and Prometheus come from the system.
.deploy/%/.done: requirements/deploy-%.lock | $(BIN)/python
	@echo "Installing requirements/deploy-$*.lock into .deploy/$*" >&2
	@$(BIN)/python -m venv .deploy/$*
	@.deploy/$*/bin/python -m pip install --quiet --require-hashes -r $<
	@touch $@

deploy-tools: .deploy/tools/.done

test-deploy: $(VENV)/.dev .deploy/tools/.done
	@$(MAKE) --no-print-directory -k .deploy/router/.done .deploy/litellm/.done || echo "their tests are skipped" >&2
	@$(BIN)/python -m pytest -m deploy -rs --durations=5 tests/deploy

lab: $(VENV)/.notebooks
	@$(BIN)/jupyter lab --ip 127.0.0.1 --port $(PORT) --notebook-dir notebooks \
	  --LabApp.default_url=/lab/tree/00_start_here.ipynb $(if $(filter 0,$(shell id -u)),--allow-root) $(ARGS)

# Universal resolutions: the same lock serves Linux, macOS and Windows. No index address gets into them.
COMPILE = UV_CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/uv pip compile pyproject.toml --quiet --upgrade \
  --universal --python-version 3.11 --generate-hashes --no-annotate --no-emit-index-url --no-config

lock: $(VENV)/.dev
	$(COMPILE) --extra notebooks --extra build -o requirements/notebooks.lock
	$(COMPILE) --extra notebooks --extra build --extra dev -c requirements/notebooks.lock -o requirements/dev.lock

# The engines' locks, for the one platform they are pinned for. CUDA: resolved, installed on a GPU host only.
lock-engines: export UV_CUSTOM_COMPILE_COMMAND := make lock-engines
lock-engines: $(VENV)/.dev
	for engine in vllm sglang; do for kind in cpu cuda; do \
	  name=requirements/engine-$$engine-$$kind; \
	  [ $$kind = cuda ] || extra="--no-emit-package torch --override $$name.overrides"; \
	  $(BIN)/uv pip compile $$name.in -o $$name.lock $${extra:-} --quiet --upgrade --generate-hashes \
	    --python-version 3.11 --python-platform x86_64-manylinux_2_34 \
	    --no-annotate --no-emit-index-url --no-config || exit 1; \
	  extra=; \
	done; done

lock-agents: $(VENV)/.dev
	UV_CUSTOM_COMPILE_COMMAND="make lock-agents" $(BIN)/uv pip compile requirements/agents.in \
	  -o requirements/agents.lock --quiet --upgrade --universal --python-version 3.11 --generate-hashes \
	  --no-annotate --no-emit-index-url --no-config

lock-deploy: export UV_CUSTOM_COMPILE_COMMAND := make lock-deploy
lock-deploy: $(VENV)/.dev
	for name in tools router litellm dstack; do \
	  $(BIN)/uv pip compile requirements/deploy-$$name.in -o requirements/deploy-$$name.lock --quiet --upgrade \
	    --generate-hashes --python-version 3.11 --python-platform x86_64-manylinux_2_34 \
	    --no-annotate --no-emit-index-url --no-config || exit 1; \
	done

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
