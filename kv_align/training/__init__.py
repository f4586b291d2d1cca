"""The method's step and the loop around it: optimisation, checkpoints, preemption, several processes."""
