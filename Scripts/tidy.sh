#!/usr/bin/env bash
# The house rules a formatter does not know; part of `make lint`. What they are: Scripts/tidy.py.
exec python3 "$(dirname "${BASH_SOURCE[0]}")/tidy.py" "$@"
