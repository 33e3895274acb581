#!/usr/bin/env bash
# Drop attention or MLP sublayers into the folder layout that the analysis scripts read. Change the variables on top.
set -euo pipefail
compress=$(cd "$(dirname "$0")/../.." && pwd)/compress.py

model=${MODEL:-smollm2-135m}
root=${DROPPED_ROOT:-results_prune}
target_layer=${TARGET_LAYER:-attn}
drop_n=${DROP_N:-8}
dataset=${DATASET:-self} # c4_val needs a network; or a text file
samples=${SAMPLES:-32}
cutoff_len=${CUTOFF_LEN:-256}

"${PYTHON:-python}" "$compress" --stage prune --prune_method layer_drop --layer_drop_method discrete \
  --model_name_or_path "$model" --target_layer "$target_layer" --drop_n "$drop_n" --dropped_root_path "$root" \
  --dataset "$dataset" --n_calibration_samples "$samples" --cutoff_len "$cutoff_len"
