"""What belongs to a run: when, on which samples and on which processes it is measured."""
