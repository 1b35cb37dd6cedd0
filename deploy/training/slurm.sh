#!/bin/bash
# Distil on several nodes under SLURM: sbatch deploy/training/slurm.sh recipe.yaml /shared/runs/sd3
# A job that is preempted or runs out of time is queued again and resumes from its newest checkpoint.
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

srun --kill-on-bad-exit=1 torchrun \
  --nnodes="$SLURM_NNODES" --nproc-per-node="${SLURM_GPUS_ON_NODE:-8}" \
  --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$head_node:29400" \
  --no-python flashbulb distill run "$recipe" --out "$out" --resume
