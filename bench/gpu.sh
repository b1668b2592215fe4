#!/usr/bin/env bash
# Runs everything that needs a GPU: the GPU tests, each kernel's time beside its floor, and a model that is quantized
# and verified on the GPU in four formats. Run it from the repository after `pip install -e '.[test,cuda]'`, with a CUDA
# build of torch.
#
#     bench/gpu.sh MODEL [WORK]      MODEL: a Hugging Face folder; WORK: the folder for exports (default: gpu-work)
set -euo pipefail
cd "$(dirname "$0")/.."
model=${1:?give the folder of a Hugging Face model}
work=${2:-gpu-work}
python=${PYTHON:-python}

# Without this check, a run that skips all tests would look like a pass.
$python -c 'from lqexport.kernels import cuda; import sys; sys.exit(cuda.missing())'
$python -m pytest -m gpu tests
$python bench/kernels.py time
mkdir -p "$work"
quantized() {  # TARGET, options ...: quantizes into $work/artifact and prints the time
  rm -rf "$work/artifact"
  time $python -m lqexport quantize "$model" "$work/artifact" --device cuda --target "$@"
}
verified() {  # FILE: verifies it; the kernels decode its tensors
  $python -m lqexport verify "$1" --against "$model" --artifact "$work/artifact" --device cuda
}
quantized gguf:Q4_K
$python -m lqexport to-gguf "$work/artifact" "$work/model.gguf"
verified "$work/model.gguf"
quantized native:table-4
verified "$work/artifact"
quantized exl2 --bits 4
rm -rf "$work/exl2"
$python -m lqexport to-exl2 "$work/artifact" "$work/exl2"
verified "$work/exl2"
quantized exl3:3
rm -rf "$work/exl3"
$python -m lqexport to-exl3 "$work/artifact" "$work/exl3"
verified "$work/exl3"
