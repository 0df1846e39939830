#!/bin/sh
# The official client as it is on PyPI. Into the directory that is given, or where train.toml looks for it.
set -eu
"${PYTHON:-python3}" -m pip install --quiet --target "${1:-runs/packages/openai_client}" openai==3.57.0
