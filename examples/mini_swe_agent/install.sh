#!/bin/sh
# mini-swe-agent as it is on PyPI, and of what it depends on all but `datasets` (350 MB with what that brings), which
# only its benchmarks use. Into the directory that is given, or where train.toml looks for it.
set -eu
into=${1:-runs/packages/mini_swe_agent}
python=${PYTHON:-python3}
"$python" -m pip install --quiet --target "$into" --no-deps mini-swe-agent==2.4.6
"$python" -m pip install --quiet --target "$into" \
    litellm==1.110.2 openai pyyaml requests jinja2 'pydantic>=2' tenacity rich python-dotenv typer platformdirs textual \
    prompt_toolkit
