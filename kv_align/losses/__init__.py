"""What a run minimises: one file for each choice of `conf/loss`, and the formulas that they share."""
