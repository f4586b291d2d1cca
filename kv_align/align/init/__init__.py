"""Where the head mix of a structured aligner starts: one file per informed start, and `fixed` for those that read nothing."""
