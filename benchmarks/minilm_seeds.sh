#!/usr/bin/env bash
# The README's table: the main recipe with three seeds, its report kept beside the other results.
set -euo pipefail
cd "$(dirname "$0")/.."
distill run minilm seeds=3 --out runs/minilm-seeds
cp runs/minilm-seeds/report.json benchmarks/results/minilm_seeds.json
