"""One run over several processes: replicated (DDP) or sharded (FSDP)."""
