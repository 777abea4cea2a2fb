"""The processes that do the work: the serving loop and the pager."""
