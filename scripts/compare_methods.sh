#!/usr/bin/env bash
# Every base method on SmolLM2-135M with the default reward: same prompts, same number of sampled tokens, three seeds; then one table.
# Usage: scripts/compare_methods.sh [SETTING=VALUE ...]     type it again after an interruption: what is finished is skipped
# METHODS, SEEDS, STEPS, PARALLEL and NAME in the environment change what runs; the defaults take under 3 hours on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
rlhf=.venv/bin/rlhf
METHODS=${METHODS:-reinforce,reinforce_pp,reinforce_pp_baseline,rloo,remax,ppo,ppo_shared,grpo,dr_grpo,dapo,gspo,cispo}
SEEDS=${SEEDS:-1,2,3}
STEPS=${STEPS:-12}
PARALLEL=${PARALLEL:-2}
NAME=${NAME:-base-methods}
# A term without weight loads the reference and shows the KL of every method.
monitor="+objective@updates.policy.monitor.objective=kl_k1 +reduce@updates.policy.monitor.reduce=token_mean updates.policy.monitor.coef=0"
# 8 x 4 responses a step for all, whatever a recipe's own batch; ReMax adds a greedy one per prompt, DAPO the rollouts it throws away.
"$rlhf" train -m "algo=$METHODS" "seed=$SEEDS" "sweep.name=$NAME" "sweep.parallel=$PARALLEL" "steps=$STEPS" \
    batch.prompts=8 batch.samples=4 optim.lr=2e-5 checkpoint.every=0 checkpoint.export=false tracker=none $monitor "$@"
sweep=runs/sweeps/$NAME
baseline=baseline=algo=${BASELINE:-grpo}
# held-out reward with its interval, what each method costs, KL in nats per token from the reference at the last steps, and the length of held-out responses
"$rlhf" compare "$sweep" "$baseline" also=policy/kl,eval/tokens "csv=$sweep/reward.csv"
