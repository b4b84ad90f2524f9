#!/usr/bin/env bash
# Few-step sampling of a published FAR checkpoint: is the preset "fast" as good as T = 100?
#
#   examples/fewstep_published.sh far_h.pth kl16.ckpt WORK [IMAGES_PER_CLASS]
#
# Needs: pip install "fastfar[eval]" torch-fidelity, and the two published files. 50 images per
# class are the customary 50,000. Stopped, it goes on with the next unfinished step.
set -euo pipefail
if [ $# -lt 3 ]; then
    sed -n '2,7p' "$0"
    exit 2
fi
weights=$1 vae=$2 work=$3 per_class=${4:-50}
model=$work/model
mkdir -p "$work"
if [ ! -e "$work/converted" ]; then
    fastfar convert "$weights" "$model"
    fastfar convert "$vae" "$model"
    touch "$work/converted"
fi

# 1. Tokens of every outer step, given the teacher's conditions: energy distance, variance, mean.
fastfar experiment fewstep E2 --tokens --checkpoint "$model" --work "$work/experiment" \
    --conditions 64 --draws 64 > "$work/tokens.md"

# 2. Whole images by the published plan and by the preset, the same seeds.
classes=$(seq -s, 0 999)
for plan in official-nomask fast; do
    [ -e "$work/$plan.png" ] || fastfar sample "$model" --plan "$plan" --classes "$classes" \
        --per-class "$per_class" --images "$work/$plan" --output "$work/$plan.png" --quiet
done

# 3. The distance between the two, and their precision and recall, on Inception features. For FID
#    against ImageNet give the reference images as a third folder.
fidelity --samples-find-deep --fid --prc --input1 "$work/fast" --input2 "$work/official-nomask"
