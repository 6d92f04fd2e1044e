#!/usr/bin/env bash
# sbatch recipes/slurm.sh --scale paper --stage 2 --data DIR --out RUN      (8 nodes of 8 GPUs; change the two lines below)
# SLURM sends SIGTERM two minutes before the time is over: training saves a checkpoint and ends; submitting the same line again goes on from it.
#SBATCH --nodes=8
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --signal=TERM@120
set -euo pipefail
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
exec srun torchrun --nnodes="$SLURM_NNODES" --nproc-per-node="${SLURM_GPUS_PER_NODE:-8}" --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d \
  --rdzv-endpoint="$head:29500" -m dreamllm_edu.train --strategy fsdp2 "$@"
