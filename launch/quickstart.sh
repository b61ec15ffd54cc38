#!/usr/bin/env bash
# The whole story in small, on a laptop: a tokenizer, an autoregressive model of Python, its
# adaptation to masked diffusion, mid-training, instruction tuning, coupled-GRPO, scores of each stage, the
# order of decoding, and a report to open in a browser.
#   bash launch/quickstart.sh [WORKDIR]          about 10 minutes on 2 cores
# Every step is a program that a pod would run with another config. Started again with the same
# WORKDIR, it goes on where it stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh
enter_venv report

WORKDIR=${1:-$PWD/workdir_quickstart}
AR_STEPS=${AR_STEPS:-250}          # autoregressive pre-training
ADAPT_STEPS=${ADAPT_STEPS:-350}    # from there to diffusion; "scratch" gets the sum of both
MID_STEPS=${MID_STEPS:-60}         # on cleaned functions
SFT_STEPS=${SFT_STEPS:-1400}       # on small programming problems
RL_STEPS=${RL_STEPS:-20}           # on the rewards of running its answers to more of them
mkdir -p "$WORKDIR" || fail "cannot write to $WORKDIR; name another folder"
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
# What one step compiled another one need not, nor the same step when it is started again.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$WORKDIR/compiled}
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
TOKENIZER=$WORKDIR/tokenizer.model

step() { echo; echo "== $* (minute $((SECONDS / 60)))"; }
train() { python -m diffucoder_jax.train "$@"; }

step "1/14 a tokenizer, trained on this Python's standard library"
[ -s "$TOKENIZER" ] ||
  python -m diffucoder_jax.prepare tokenizer --config=configs/quickstart_ar.py --output="$TOKENIZER"

step "2/14 an autoregressive model, $AR_STEPS steps"
train --config=configs/quickstart_ar.py --workdir="$WORKDIR/ar" \
  --config.tokenizer="$TOKENIZER" --config.optim.steps="$AR_STEPS"

# Nothing waits for it before the report, and two processes keep two cores busier than one does.
step "3/14 for comparison, diffusion from scratch, $((AR_STEPS + ADAPT_STEPS)) steps, beside what follows:" \
  "$WORKDIR/scratch.log"
train --config=configs/quickstart_adapt.py:scratch --workdir="$WORKDIR/scratch" \
  --config.tokenizer="$TOKENIZER" --config.optim.steps="$((AR_STEPS + ADAPT_STEPS))" \
  >"$WORKDIR/scratch.log" 2>&1 &
SCRATCH=$!
trap 'kill $SCRATCH 2>/dev/null || true' EXIT

step "4/14 its adaptation to masked diffusion, $ADAPT_STEPS steps: attention opens from causal to full"
train --config=configs/quickstart_adapt.py --workdir="$WORKDIR/adapt" \
  --config.init_from="$WORKDIR/ar" --config.optim.steps="$ADAPT_STEPS"

step "5/14 completing and infilling functions that were held out"
python -m diffucoder_jax.prepare prompts --config=configs/quickstart_ar.py \
  --config.tokenizer="$TOKENIZER" --output="$WORKDIR/prompts.jsonl"
python -m diffucoder_jax.generate --checkpoint "$WORKDIR/adapt" --prompts "$WORKDIR/prompts.jsonl" \
  --max_new_tokens 40 --temperature 0.5 --alternatives 4 \
  --output "$WORKDIR/samples.jsonl" --traces "$WORKDIR/traces"

step "6/14 one of them again, its denoising replayed"
head -n 1 "$WORKDIR/prompts.jsonl" >"$WORKDIR/first.jsonl"
python -m diffucoder_jax.generate --checkpoint "$WORKDIR/adapt" --prompts "$WORKDIR/first.jsonl" \
  --show --max_new_tokens 40 --temperature 0.5

step "7/14 mid-training on cleaned functions, $MID_STEPS steps"
train --config=configs/quickstart_midtrain.py --workdir="$WORKDIR/mid" \
  --config.init_from="$WORKDIR/adapt" --config.optim.steps="$MID_STEPS"

step "8/14 instruction tuning on small programming problems, from fresh weights, $SFT_STEPS steps"
[ -s "$WORKDIR/problems/test.jsonl" ] ||
  python -m diffucoder_jax.prepare problems --config=configs/quickstart_sft.py \
    --output="$WORKDIR/problems"
train --config=configs/quickstart_sft.py --workdir="$WORKDIR/sft" \
  --config.tokenizer="$TOKENIZER" --config.optim.steps="$SFT_STEPS" \
  --config.data.path="$WORKDIR/problems/train.jsonl"

step "9/14 its answers to problems that were held out"
head -n 128 "$WORKDIR/problems/test.jsonl" >"$WORKDIR/questions.jsonl"
python -m diffucoder_jax.generate --checkpoint "$WORKDIR/sft" --chat --system '' \
  --prompts "$WORKDIR/questions.jsonl" --max_new_tokens 50 --steps 25 --temperature 0 --top_p 1 \
  --batch_size 64 --output "$WORKDIR/answers.jsonl" | tail -n 16

step "10/14 coupled-GRPO: rewards from running its answers, $RL_STEPS steps"
python -m diffucoder_jax.train_grpo --config=configs/quickstart_grpo.py --workdir="$WORKDIR/grpo" \
  --config.init_from="$WORKDIR/sft" --config.problems.path="$WORKDIR/problems/train.jsonl" \
  --config.problems.eval_path="$WORKDIR/problems/test.jsonl" --config.optim.steps="$RL_STEPS"

step "11/14 how many held-out problems each stage solves"
for stage in mid sft grpo; do
  python -m diffucoder_jax.evaluate --checkpoint "$WORKDIR/$stage" --output "$WORKDIR/scores/$stage" \
    --benchmark problems --data_path "$WORKDIR/questions.jsonl" --chat --system '' --batch_size 64 \
    --max_new_tokens 48 --steps 12 --temperature 0 --top_p 0.9 | sed -n '1p;4p'
done

step "12/14 in which order it decodes, at four temperatures"
python -m diffucoder_jax.analyze --checkpoint "$WORKDIR/grpo" --chat --system '' \
  --prompts "$WORKDIR/questions.jsonl" --limit 12 --temperatures 0.2 0.6 1.0 1.2 --seeds 3 \
  --max_new_tokens 48 --top_p 1 --batch_size 12 --output "$WORKDIR/analysis"

wait "$SCRATCH" || fail "the model from scratch failed; see $WORKDIR/scratch.log"
step "13/14 the report"
python -m diffucoder_jax.evals.report --workdir "$WORKDIR" --title "Quickstart" \
  --config configs/quickstart_adapt.py \
  --runs ar="$WORKDIR/ar" adapt="$WORKDIR/adapt" scratch="$WORKDIR/scratch" \
  --stages mid="$WORKDIR/mid" sft="$WORKDIR/sft" --answers "$WORKDIR/answers.jsonl" \
  --reinforced "$WORKDIR/grpo" --analysis "$WORKDIR/analysis" \
  --scores mid-trained="$WORKDIR/scores/mid" instruction-tuned="$WORKDIR/scores/sft" \
  coupled-GRPO="$WORKDIR/scores/grpo" \
  --samples "$WORKDIR/samples.jsonl" --trace "$WORKDIR/traces/0.npz"

step "14/14 the model for people on PyTorch: a folder that transformers loads"
python -m diffucoder_jax.convert --source "$WORKDIR/grpo" --target "$WORKDIR/hf" --overwrite
if python -c 'import torch, transformers' 2>/dev/null; then
  python launch/check_export.py "$WORKDIR/hf"
else
  echo "(not checked there: PyTorch is not installed; .venv/bin/pip install -e '.[torch]' and run" \
    "python launch/check_export.py $WORKDIR/hf)"
fi

echo
echo "done in $((SECONDS / 60)) min $((SECONDS % 60)) s: open $WORKDIR/report/index.html"
