#!/bin/bash
# Several machines under Slurm, 8 GPUs each: sbatch examples/launch/slurm.sh
# When it is submitted again, or requeued after a time limit, the run continues from its last complete checkpoint.
#SBATCH --job-name=recover
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --output=%x-%j.log
set -euo pipefail

main=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun \
  --nnodes "$SLURM_NNODES" --nproc_per_node 8 \
  --rdzv_id "$SLURM_JOB_ID" --rdzv_backend c10d --rdzv_endpoint "$main:29500" \
  post_training.py \
    --prune_model prune_log/llama_prune \
    --data_path yahma/alpaca-cleaned \
    --batch_size 128 --micro_batch_size 4 \
    --output_dir tune_log/llama \
    --resume_from_checkpoint auto
