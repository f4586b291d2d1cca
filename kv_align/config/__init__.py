"""What a run is asked to do: the typed schema of `conf/`, its checks, and the command lines. Imports no torch."""
