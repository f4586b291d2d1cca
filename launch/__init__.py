"""Many runs: a sweep is planned, checked, queued on Slurm or on this machine, watched, resumed, cancelled and extended.

Knows `kv_align.config`, `.schema`, `.effective`, `.compose`, `.errors`, `.runs`, `.plans`, `.provenance` and `.progress`;
only `launch.worker` imports the trainer. Nothing here imports torch.
"""
