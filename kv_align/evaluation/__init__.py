"""What is measured of a student: validation loss, agreement with the teacher, exact match, and the probe."""
