"""Ways to start a run on several processes or machines: torchrun, Ray, Slurm, Kubernetes, SkyPilot.

All end in `interlace.trainer.loop.train`. `parser.py` has their words and `request.py` fixes the
run that is meant. torchrun: `torchrun.py` says what is started, `elastic.py` is one start and
`supervising.py` decides about the next. Jobs of schedulers: `jobs.py` fills `launch/templates` and
hands them over; `slurm_job.py` and `slurm_node.py` run inside a Slurm job. `ray/` is Ray.
"""
