"""Statistics as pure functions on arrays: nothing here knows what a run is."""
