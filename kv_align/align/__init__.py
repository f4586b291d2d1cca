"""How a teacher's keys, values and queries are brought into the student's shape: head maps, layer maps, time warp."""
