#!/bin/sh
# Installs labkit from this folder without a network: sh install.sh [PYTHON]
set -eu
here="$(cd "$(dirname "$0")" && pwd)"
exec "${1:-python3}" "$here/install.py"
