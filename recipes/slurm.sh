#!/usr/bin/env bash
# sbatch recipes/slurm.sh --scale paper --stage 2 --data DIR --out RUN      (8 nodes of 8 GPUs; change the two lines below)
# SLURM sends SIGTERM two minutes before the time is over: training ends its step, saves a checkpoint and stops; submitting the same line again resumes from it.
# torchrun kills its ranks 30 s after a SIGTERM, unless TORCH_ELASTIC_SHUTDOWN_TIMEOUT says otherwise (torch 2.12 or newer). A step and a checkpoint of yours take longer
# than two minutes? Raise both numbers.
#SBATCH --nodes=8
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --signal=TERM@120
set -euo pipefail
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=120
torchrun --help | grep -e --shutdown-timeout > /dev/null || {
  echo "slurm.sh: this torchrun leaves its ranks 30 s to save, not two minutes; install torch 2.12 or newer" >&2
  exit 1
}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
exec srun torchrun --nnodes="$SLURM_NNODES" --nproc-per-node="${SLURM_GPUS_PER_NODE:-8}" --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d \
  --rdzv-endpoint="$head:29500" -m dreamllm_edu.train --strategy fsdp2 "$@"
