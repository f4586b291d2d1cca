"""What a run minimises besides nothing: one file per choice of `conf/loss`."""
