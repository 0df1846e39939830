#!/bin/sh
# mini-swe-agent as it is on PyPI, and of what it depends on all but `datasets` (200 MB), which only its benchmarks use.
set -eu
into=runs/packages/mini_swe_agent
python3 -m pip install --quiet --target "$into" --no-deps mini-swe-agent==2.4.6
python3 -m pip install --quiet --target "$into" \
    litellm==1.110.2 openai pyyaml requests jinja2 'pydantic>=2' tenacity rich python-dotenv typer platformdirs textual \
    prompt_toolkit
