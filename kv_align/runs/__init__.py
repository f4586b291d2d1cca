"""THE CONTRACT: what a run and a sweep leave on disk, how it is written and how it is read. Imports no torch."""
