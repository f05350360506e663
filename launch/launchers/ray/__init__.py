"""`interlace launch ray`: a run as a job of Ray Train, on this machine or on a cluster.

`command.py` is what the command does, `request.py` what its words ask for, `cluster.py` starts or
joins Ray, `bridge.py` connects the ranks with the terminal, `driving.py` lets Ray Train run the
ranks, and `worker.py` is what each of them does.
"""
