"""Commands beside training, one verb a file: `python -m scripts.VERB --help`."""
