"""How a sweep is executed: what every kind of cluster can be told, and the copy of it that is frozen into a sweep."""
