#!/usr/bin/env bash
# One process per GPU under SLURM; resubmits itself when its time is over or a process hangs.
#   sbatch --nodes 4 docs/launch/slurm.sh CONFIG RUN_DIR [--mesh.preset fsdp ...]
#SBATCH --job-name=megalodon
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
# Five minutes before the end every process gets SIGTERM, saves a checkpoint and exits with 143.
#SBATCH --signal=TERM@300
set -euo pipefail
config=$1 run_dir=$2
shift 2

code=0
srun megalodon train "$config" --run_dir "$run_dir" --auto_resume "$@" || code=$?
case $code in
  75 | 143) scontrol requeue "$SLURM_JOB_ID" ;;
esac
exit "$code"
