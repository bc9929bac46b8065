"""A real Slurm cluster of eight nodes on this one machine, to try, to learn and to rehearse on."""
