"""This machine's slots: a supervisor process works a queue of runs off."""
