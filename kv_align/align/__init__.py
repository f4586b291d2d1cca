"""How a teacher's keys, values and queries are brought into the student's shape. One file per variant."""
