#!/bin/bash
# @{RUN_NAME} on @{NODES} nodes, written by `interlace launch slurm`. The run folder is fixed, so that every
# start of this job, after a preemption or the time limit too, continues the same run.
#SBATCH --job-name=@{RUN_NAME}
#SBATCH --nodes=@{NODES}
#SBATCH --ntasks-per-node=1
#SBATCH --time=@{TIME}
# Nodes whole: optimizer state on the host needs their memory, and its updates their cores.
#SBATCH --exclusive
#SBATCH --mem=0
# So long before the time limit the job itself is told; it saves and goes back to the queue.
#SBATCH --signal=B:USR1@@@{NOTICE}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=@{LOG}
@{OPTIONS}
umask 077
cd @{WORK_FOLDER} || exit 2

# In place of the shell, so that Slurm's signals reach it.
exec @{PYTHON} -m interlace.launch.launchers.slurm_job @{JOB_OPTIONS} -- \
    @{WORDS}
