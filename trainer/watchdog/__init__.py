"""Notices that a rank has stopped making progress, says who waits for whom, and ends the run, so
that a launcher can start it again.

Every rank has a watcher, a process of its own that loads neither torch nor numpy: it goes on when
the rank is stopped by a signal or hangs in C code that holds the interpreter's lock, where no
thread of the rank could. The watcher reads the rank's pulse (`interlace.trainer.heartbeat`) and
counts the time without a beat on its own monotonic clock; clocks of other machines and clocks on
the wall play no part.

`patience` says how long is too long, `watcher` is that process, `reports` are what the watchers of
all ranks tell each other once one of them has lost patience, `verdict` makes a page for a person of
them, and `watch` is the rank's side. How others do it: nvidia-resiliency-ext has heartbeats and
sections with a limit of five times the longest interval seen; torchtitan lowers the timeout of
collectives after the first step.
"""
