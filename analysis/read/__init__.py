"""From folders of runs to data frames, fast, and what is wrong with them."""
