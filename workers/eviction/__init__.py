"""Which expert goes when a slot is needed: policies that the pager and the replay share, in C (core/policy.h)."""
