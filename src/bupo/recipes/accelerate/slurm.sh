#!/bin/bash
# sbatch recipes/accelerate/slurm.sh --config RECIPE --output FOLDER [OPTION ...]
# Two machines of 8 GPUs, a process a GPU. FOLDER lies where all machines see it. By itself this is DDP; FSDP2 is --fsdp full_shard,
# and ZeRO --deepspeed FILE (docs/scale.md).
#SBATCH --job-name=bupo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

# srun starts every process itself: torchrun would kill them 30 seconds after a signal, which may be less than an update. Ten
# minutes before the job's time is over they get SIGTERM, finish the update, and leave a checkpoint.
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST") # in whole: `| head` may close the pipe on scontrol, which ends the job
MASTER_ADDR=${hosts%%$'\n'*}
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT
status=0
srun --kill-on-bad-exit=0 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
    exec bupo train "$@"
' bupo "$@" --resume_from_checkpoint true || status=$?

# 128 and the number of SIGTERM: stopped, not finished. The same job goes on from its checkpoint
if ((status == 143)); then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
