"""Ways to start a run on several processes or machines; all end in `interlace.trainer.loop.train`."""
