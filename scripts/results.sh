#!/usr/bin/env bash
# The results table of README.md: the main job, and the same job with rewards shuffled within the batch, which must not gain.
# Usage: scripts/results.sh [SETTING=VALUE ...]     about 15 minutes on two cores
set -euo pipefail
cd "$(dirname "$0")/.."
rlhf=.venv/bin/rlhf
"$rlhf" train algo=grpo reward=bleu run.name=results-main "$@"
"$rlhf" train algo=grpo reward=bleu debug=shuffled_reward run.name=results-shuffled "$@"
