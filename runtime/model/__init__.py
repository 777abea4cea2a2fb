"""What a checkpoint is: its configuration, its tokenizer, and where in its files each tensor lies."""
