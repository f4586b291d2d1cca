"""What trains a few new parameters of a student in the place of its own."""
