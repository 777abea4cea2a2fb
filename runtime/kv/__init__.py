"""The paged KV cache: pages, block tables, and prompts that begin alike sharing pages. The coordinator holds the one
of an instance; `PagedKvCache` in `cache` works as well alone, in a program that wants nothing but the cache.
"""
