"""The commands of `python -m liger`: one file each, which returns an `Answer`, and how an answer is shown."""
