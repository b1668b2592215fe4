#!/usr/bin/env bash
# Tests large models on a machine with a GPU: memory by depth, several whole layers of a 7B model's shape in 8 GB of GPU
# memory, a CPU run under a hard memory limit, 1, 2 and 4 processes, and NCCL. Needs 26 GB of disk, and no network.
#
#     bench/gpu_scale.sh OUT [SECTION ...]      sections: layers experts depth limit processes nccl (default: all, in this order)
#
# OUT gets a text file and a log for each section; at the end the script prints the text files. Environment variables:
# WORK (default: OUT/work) is the folder for models; DEVICE (cuda), LAYERS (2 4 8 16), HIDDEN (4096), INTERMEDIATE
# (14336) and VOCABULARY (32000) change device and sizes.
set -uo pipefail
out=$(mkdir -p "${1:?give a folder for the results}" && cd "$1" && pwd)
shift
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
device=${DEVICE:-cuda}
work=${WORK:-$out/work}
layers=${LAYERS:-2 4 8 16}
shape="--hidden ${HIDDEN:-4096} --intermediate ${INTERMEDIATE:-14336} --vocabulary ${VOCABULARY:-32000}"
# Only two small linears of each block are solved, and the others are written in float16, so that depth takes the time.
few="--target gguf:Q4_K --type *=F16 --type *.k_proj.weight=Q4_K --type *.v_proj.weight=Q4_K"
few="$few --prefix full --moments normalized --samples 2 --sequence-length 32 --descent 1 --tune 0"
set -f  # the options above hold *

depth() { $python bench/depth.py --work "$work/depth" --layers $layers $shape --device "$device" -- $few; }
layers() {  # every linear with the default options, but fewer samples and tuning steps
  $python bench/depth.py --work "$work/layers" --layers 1 3 $shape --device "$device" -- --target gguf:Q4_K \
    --samples 32 --sequence-length 512 --tune 4 --device-memory 8GB
}
experts() {  # a block of 128 experts, which are solved some at a time
  $python bench/depth.py --work "$work/experts" --layers 1 --hidden 2048 --intermediate 768 --experts 128 \
    --vocabulary 32000 --device "$device" -- --target gguf:Q4_K --samples 32 --sequence-length 512 --tune 4 \
    --device-memory 5GB
}
limit() {  # the deepest model, on the CPU
  $python bench/depth.py --work "$work/limit" --layers ${layers##* } $shape --limit "${LIMIT:-5GB}" -- $few
}
small() {  # FOLDER: writes a model of 8 blocks of 1024 x 2816
  local arguments="Path('$1'), 8, ${HIDDEN_SMALL:-1024}, ${INTERMEDIATE_SMALL:-2816}, 512"
  $python -c "from pathlib import Path; import runpy
runpy.run_path('bench/depth.py')['write_model']($arguments)"
}
processes() {
  small "$work/small" && $python bench/processes.py "$work/small" --work "$work/processes" --threads "${THREADS:-4}" -- \
    --target gguf:Q4_K --calibration "$work/small/text.txt" --samples 16 --sequence-length 64 --tune 0
}
nccl() {
  small "$work/nccl-model" && $python -m torch.distributed.run --standalone --nproc-per-node 1 bench/nccl.py \
    "$work/nccl-model" --work "$work/nccl" -- --target gguf:Q4_K --calibration "$work/nccl-model/text.txt" \
    --samples 16 --sequence-length 64 --tune 0
}

sections=${*:-layers experts depth limit processes nccl}
failed=0
for section in $sections; do
  rm -rf "$work" && mkdir -p "$work"
  began=$SECONDS
  "$section" > "$out/$section.txt" 2> "$out/$section.log"
  status=$?
  ((status)) && failed=1 && tail -n 5 "$out/$section.log" >> "$out/$section.txt"
  echo "$section: exit status $status, $((SECONDS - began)) s" | tee -a "$out/$section.txt"
  rm -rf "$work"
done
for section in $sections; do
  echo && echo "== $section" && cat "$out/$section.txt"
done
exit $failed
