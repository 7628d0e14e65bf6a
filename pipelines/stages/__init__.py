"""The stages of a run, a file each: what a command does with its folders."""

# Those of `smalti run`, in their order.
ORDER = ("pack", "train-tokenizer", "encode", "train-prior", "sample", "evaluate")
