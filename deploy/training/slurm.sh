#!/bin/bash
# Distil on several nodes under SLURM: sbatch deploy/training/slurm.sh recipe.yaml /shared/runs/sd3
# A job that is preempted, runs out of time or loses a node is queued again and resumes from its newest checkpoint, as
# long as it gets further each time: one that fails without a new checkpoint stays failed.
#SBATCH --job-name=flashbulb-distill
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
set -euo pipefail
if [ $# -ne 2 ]; then
  echo "slurm.sh: expected a recipe and a run folder: sbatch deploy/training/slurm.sh RECIPE.yaml FOLDER" >&2
  exit 2
fi
recipe=$1
out=$2
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
mkdir -p "$out"
started=$(mktemp "$out/.started-XXXXXX")
trap 'rm -f "$started"' EXIT

# A port of its own for each job: two jobs may have the same first node.
code=0
srun --kill-on-bad-exit=1 torchrun \
  --nnodes="$SLURM_NNODES" --nproc-per-node="${SLURM_GPUS_ON_NODE:-8}" \
  --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$head_node:$((20000 + SLURM_JOB_ID % 10000))" \
  --no-python flashbulb distill run "$recipe" --out "$out" --resume || code=$?

# SLURM sends the signal to the processes and not to this script, and queues no job again that ends by itself, which a
# run does that writes a checkpoint when it is told to stop. (scancel ends this script as well: nothing is queued then.)
if [ "$code" -ne 0 ] && [ -n "$(find "$out" -name '*.safetensors' -newer "$started" -print -quit)" ]; then
  echo "slurm.sh: the run ended with $code after new checkpoints: queued again" >&2
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
