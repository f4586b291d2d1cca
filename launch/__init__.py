"""Many runs: a sweep is planned, checked, queued on Slurm or on this machine, watched, resumed, cancelled and extended.

Knows `kv_align.config` and `kv_align.runs`; only `launch.worker.worker` imports the trainer. Nothing here imports torch.
"""
