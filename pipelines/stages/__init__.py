"""The stages of a run, a file each: what a command does with its folders."""
