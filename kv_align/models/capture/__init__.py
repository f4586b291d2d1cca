"""Reading keys, values, queries and hidden states of any decoder from the outside, and proving that they are right."""
